"""Choosing among candidates: PSNR_bic quantiles, coverage of the real embeddings, and what a comparison finds."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from ddsr_core.config import Runtime
from ddsr_core.errors import InputError
from ddsr_core.imaging.bicubic import psnr_bic
from ddsr_core.imaging.decode import decode_rgb
from ddsr_core.imaging.images import save_png, to_float
from ddsr_core.pseudo_labels.embedders import embed_images, load_embedder
from ddsr_core.sampling import selection
from ddsr_core.sampling.selection import (
    Nearest,
    References,
    choose,
    compare,
    farthest_first,
    most_covering,
    own_cluster_first,
    quantile_groups,
    random_score,
    score,
    thumbnail_vectors,
    unit_length,
)
from tests.helpers.sample_inputs import EMBEDDINGS, patch_rows, write_clusters_with_distances, write_embeddings
from tests.helpers.tiny_base import write_clusters, write_patches

NO_VECTORS = np.zeros((1, 1000), np.float32)


def test_the_choice_follows_the_distribution_and_not_the_lowest():
    target = np.linspace(20, 24, 101)
    candidates = np.array([10.0, 20.4, 21.2, 22.1, 22.9, 23.5, 30.0, 35.0])
    assert choose("psnr_bic", candidates, target, NO_VECTORS[:, :8], 5).tolist() == [1, 2, 3, 4, 5]
    assert choose("none", candidates, target, NO_VECTORS[:, :8], 5).tolist() == [0, 1, 2, 3, 4]


def test_no_choice_of_the_same_size_is_nearer_by_the_assignment():
    random = np.random.default_rng(0)
    psnr, target = random.normal(25, 2, 8), random.normal(22, 1, 40)
    wanted = np.quantile(target, (np.arange(3) + 0.5) / 3)
    best = min(np.abs(np.sort(psnr[list(c)]) - wanted).sum() for c in itertools.combinations(range(8), 3))
    chosen = choose("psnr_bic", psnr, target, NO_VECTORS[:, :8], 3)
    assert np.abs(np.sort(psnr[chosen]) - wanted).sum() == pytest.approx(best)


def test_groups_rise_and_share_no_candidate():
    random = np.random.default_rng(1)
    psnr = random.normal(30, 2, 40)  # all of them above the target: every matching costs the same
    groups = quantile_groups(psnr, random.normal(20, 1, 100), 5, 3)
    assert groups.shape == (5, 3)
    assert len(np.unique(groups)) == 15
    assert (np.diff(psnr[groups.ravel()]) >= 0).all()


def test_greedy_cover_by_hand():
    # Real vectors a, b, c. Candidate 0 is near a and b a little, 1 is a copy of a, 2 covers c, 3 covers nothing.
    similarity = np.array([[0.6, 1.0, 0.0, 0.0], [0.6, 0.0, 0.0, 0.0], [0.0, 0.0, 0.9, 0.1]])
    assert most_covering(similarity, np.array([[0, 1], [2, 3]])).tolist() == [0, 2]
    # What is covered already adds nothing: after 0 (two of three), its like 1 would be next by itself, but 2 adds more.
    assert most_covering(similarity, np.array([[0, 3], [1, 2]])).tolist() == [0, 2]


def test_among_equal_gains_the_more_real_candidate_is_taken():
    similarity = np.array([[0.9, 0.5, 0.7]])
    assert most_covering(similarity, np.array([[0, 0], [1, 2]]))[1] == 2


def test_greedy_cover_reaches_half_of_the_best():
    random = np.random.default_rng(3)
    for _ in range(20):
        similarity = random.random((12, 9))
        groups = random.permutation(9).reshape(3, 3)
        every = [similarity[:, list(c)].max(1).mean() for c in itertools.product(*groups)]
        found = similarity[:, most_covering(similarity, groups)].max(1).mean()
        assert 0.5 * max(every) <= found <= max(every)
        assert found > np.mean(every)


def test_both_aims_are_met_better_than_by_chance():
    """Real patches at four places of a circle; candidates crowd at one of them and are smoother than the real ones."""
    random = np.random.default_rng(4)

    def at(angles: np.ndarray) -> np.ndarray:
        noisy = angles + random.normal(0, 0.1, len(angles))
        return np.stack([np.cos(noisy), np.sin(noisy)], 1).astype(np.float32)

    real = at(np.arange(400) % 4 * np.pi / 2)
    vectors = at(np.where(np.arange(160) < 130, 0, np.arange(160) % 4) * np.pi / 2)
    target, psnr = random.normal(22, 1, 400), random.normal(24, 1.5, 160)
    similarity = real @ vectors.T
    kept = {
        name: score(choose(name, psnr, target, similarity, 10), psnr, target, similarity)
        for name in ("none", "psnr_bic", "psnr_bic_and_coverage")
    }
    chance = random_score(10, psnr, target, similarity, seed=0)
    both = kept["psnr_bic_and_coverage"]
    assert both.coverage > chance.coverage + 0.1
    assert both.coverage > kept["psnr_bic"].coverage
    assert kept["psnr_bic"].psnr_bic_wasserstein_db <= both.psnr_bic_wasserstein_db
    assert both.psnr_bic_wasserstein_db < chance.psnr_bic_wasserstein_db


def test_scores_by_hand():
    psnr, target = np.array([20.0, 22.0, 30.0]), np.array([20.0, 24.0])
    similarity = np.array([[0.2, 0.8, 1.0], [0.6, 0.4, 1.0]])
    found = score(np.array([0, 1]), psnr, target, similarity)
    assert found.psnr_bic_wasserstein_db == pytest.approx(1.0)  # 20 and 20, 22 and 24
    assert found.coverage == pytest.approx(0.7)
    assert random_score(3, psnr, target, similarity, 0).psnr_bic_wasserstein_db == pytest.approx(
        wasserstein_distance(psnr, target)
    )


def test_a_copy_a_mirror_image_and_a_brighter_copy_have_cosine_one():
    image = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0)) * 0.5
    other = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    vector = thumbnail_vectors(image)
    assert float((vector @ thumbnail_vectors(image + 0.2).T).item()) == pytest.approx(1, abs=1e-5)
    assert float((vector @ thumbnail_vectors(other).T).item()) < 0.2


def test_the_nearest_of_several_batches():
    nearest = Nearest(2)
    nearest.update(np.array([[0.1, 0.5], [-0.9, -0.8]], np.float32), ["a", "b"])
    nearest.update(np.array([[0.4], [1.0000002]], np.float32), ["c"])
    assert nearest.patch_id == ["b", "c"]
    assert nearest.cosine.tolist() == [0.5, 1.0]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    patches = write_patches(home / "patches", count=24)
    write_clusters_with_distances(home / "clusters", count=24, k=3)
    write_embeddings(home / "embeddings", patches)
    random = np.random.default_rng(9)
    for index in range(5):
        save_png(home / "candidates" / f"{index}.png", random.integers(0, 256, (16, 16, 3)).astype(np.uint8))
    return home


def compared(home: Path) -> selection.Comparison:
    paths = sorted((home / "candidates").iterdir())
    return compare(paths, References(home / "patches", home / "clusters", home / "embeddings"), Runtime())


def test_a_comparison_equals_the_plain_one(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selection, "COMPARE_BATCH", 2)
    monkeypatch.setattr(selection, "VECTOR_BATCH", 7)
    found = compared(home)
    rows = patch_rows(home / "patches")
    ids = [row["patch_id"] for row in rows]
    real = np.stack([decode_rgb(row["image"]["bytes"], row["patch_id"]) for row in rows])
    drawn = np.stack([decode_rgb(path.read_bytes(), "") for path in sorted((home / "candidates").iterdir())])
    assert found.psnr_bic == pytest.approx(psnr_bic(to_float(drawn)).numpy(), abs=1e-4)
    assert found.real_psnr_bic == pytest.approx(psnr_bic(to_float(real)).numpy(), abs=1e-4)
    embedder = load_embedder(EMBEDDINGS)
    vectors = embed_images(drawn, embedder, EMBEDDINGS, ids), embed_images(real, embedder, EMBEDDINGS, ids)
    cosine = vectors[0] @ vectors[1].T
    assert found.by_embedding.cosine == pytest.approx(cosine.max(1), abs=1e-4)
    assert found.by_embedding.patch_id == [ids[index] for index in cosine.argmax(1)]
    thumbnails = thumbnail_vectors(to_float(real))
    cosine = np.maximum(
        thumbnail_vectors(to_float(drawn)) @ thumbnails.T, thumbnail_vectors(to_float(drawn[:, :, ::-1])) @ thumbnails.T
    )
    assert found.by_pixels.cosine == pytest.approx(cosine.max(1), abs=1e-4)
    assert found.by_pixels.patch_id == [ids[index] for index in cosine.argmax(1)]
    assert found.real_labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert [len(part) for part in found.real_vectors] == [8, 8, 8]
    assert found.real_vectors[1] == pytest.approx(unit_length(vectors[1][8:16]), abs=1e-4)


def test_coverage_is_measured_on_a_fixed_subset_of_large_clusters(home: Path, monkeypatch: pytest.MonkeyPatch):
    everything = compared(home).real_vectors[2]
    monkeypatch.setattr(selection, "COVERAGE_SAMPLE", 3)
    first, second = compared(home).real_vectors, compared(home).real_vectors
    assert [len(part) for part in first] == [3, 3, 3]
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one, other)
    assert all((row == everything).all(1).any() for row in first[2])


def test_clusters_of_other_patches_are_refused(home: Path, tmp_path: Path):
    more = write_clusters(tmp_path / "clusters", count=30)
    with pytest.raises(InputError, match="have no embedding"):
        compare([home / "candidates" / "0.png"], References(home / "patches", more, home / "embeddings"), Runtime())


def test_farthest_first_on_a_line():
    assert farthest_first(np.array([[0.0], [1.0], [5.0], [9.0]]), 4, first=1) == [1, 3, 2, 0]


def test_candidates_that_resemble_their_own_cluster_come_first():
    own, similarity = np.array([False, True, False, True]), np.array([0.9, 0.1, 0.5, 0.2])
    assert own_cluster_first(own, similarity, 1).tolist() == [1, 3]
    assert own_cluster_first(own, similarity, 3).tolist() == [0, 1, 3]  # the most similar of the others fills up
    assert own_cluster_first(own, similarity, 4).tolist() == [0, 1, 2, 3]
