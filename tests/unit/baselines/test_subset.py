"""Choices among real crops: k-center, HDC, loss-ranked."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ddsr_core.baselines import subset as subsets
from ddsr_core.baselines.config import SubsetConfig
from ddsr_core.baselines.subset import equal_draw, gradient_strength, k_center, loss_ranked
from ddsr_core.config import Runtime
from ddsr_core.errors import InputError
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.image_sets import finish_image_set, image_set_name, read_image_set
from ddsr_core.imaging.images import save_png
from ddsr_core.pseudo_labels.config import EmbeddingsConfig
from tests.helpers.interruption import digests

VGG = EmbeddingsConfig(backend="vgg16", image_px=32)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve crops of rising contrast."""
    folder = tmp_path_factory.mktemp("pool")
    random = np.random.default_rng(0)
    for index in range(12):
        noise = random.integers(-10 * index - 1, 10 * index + 2, (32, 32, 3))
        save_png(folder / image_set_name(index), (128 + noise).clip(0, 255).astype(np.uint8))
    rows = [{"photo": f"{index}.png", "y": index, "psnr_bic": 40.0 - index} for index in range(12)]
    finish_image_set(folder, rows, {"photo": pa.string(), "y": pa.int64(), "psnr_bic": pa.float64()})
    return folder


def test_k_center_takes_the_farthest_each_time():
    line = np.array([[0.0], [1.0], [2.0], [10.0], [11.0]])
    chosen = k_center(line, 3, seed=0)
    assert len(set(chosen)) == 3
    for position in (1, 2):
        before = np.abs(line - line[chosen[:position]].T).min(1)
        assert before[chosen[position]] == before.max()


def test_k_center_takes_no_image_twice_even_among_equals():
    assert sorted(k_center(np.zeros((5, 3)), 5, seed=1)) == [0, 1, 2, 3, 4]


def test_an_equal_draw_takes_labels_in_turn():
    labels = np.array([0] * 10 + [1] * 2 + [2] * 10)
    chosen = equal_draw(labels, 12, seed=0)
    assert len(set(chosen)) == 12
    assert np.bincount(labels[chosen]).tolist() == [5, 2, 5]


def test_loss_ranking_leaves_out_the_hardest_and_the_easy():
    error = np.arange(100.0)
    chosen = loss_ranked(error, SubsetConfig(kind="loss-ranked", count=20))
    assert len(set(chosen)) == 20
    assert all(50 <= index < 95 for index in chosen)
    assert sorted(loss_ranked(error[:4], SubsetConfig(kind="loss-ranked", count=4))) == [0, 1, 2, 3]


def test_gradient_strength_of_an_edge():
    flat, edge = np.full((8, 8, 3), 100, np.uint8), np.full((8, 8, 3), 100, np.uint8)
    edge[:, 4:] = 110
    strength = gradient_strength(np.stack([flat, edge]))
    assert strength[0] == 0
    assert strength[1] == pytest.approx(0.5 * 40 * 2 / 8)  # |Sobel x| is 4 x 10 in two of eight columns


@pytest.mark.parametrize("kind", ["k-center", "hdc", "loss-ranked"])
def test_a_subset_is_an_image_set_of_the_pools_images(pool: Path, tmp_path: Path, kind: str):
    config = SubsetConfig(kind=kind, count=4, embeddings=VGG, srcnn_steps=3)  # type: ignore[arg-type]
    for name in ("a", "b"):
        subsets.run(config, pool=pool, out=tmp_path / name, runtime=Runtime())
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    rows = read_image_set(tmp_path / "a")
    assert len({row["y"] for row in rows}) == 4
    for row in rows:
        original = read_rgb(pool / image_set_name(row["y"]))
        assert (read_rgb(tmp_path / "a" / row["file_name"]) == original).all()
    if kind == "hdc":
        assert min(row["y"] for row in rows) >= 5  # the half with the strongest gradients


def test_a_pool_that_is_too_small_is_refused(pool: Path, tmp_path: Path):
    with pytest.raises(InputError, match="pool of 12 images cannot give 13"):
        subsets.run(SubsetConfig(count=13, embeddings=VGG), pool=pool, out=tmp_path, runtime=Runtime())
