"""A photo_cache spares work and changes nothing: patches and embeddings with it are those without it."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from ddsr_core.config import Runtime
from ddsr_core.imaging.images import save_png
from ddsr_core.imaging.photos import photo_source
from ddsr_core.pseudo_labels import embedders, embeddings, patches, scoring
from ddsr_core.pseudo_labels.config import EmbeddingsConfig, PatchesConfig
from ddsr_core.storage.stage import Artifact
from ddsr_core.storage.store import Store
from ddsr_core.storage.vector_table import read_table, write_table

CUT = PatchesConfig(patch_px=32, stride_px=32)
VGG = EmbeddingsConfig(backend="vgg16", image_px=32, batch_size=4)


def save_photo(folder: Path, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    save_png(folder / f"{seed}.png", cv2.GaussianBlur(noise, (0, 0), 1 + 0.2 * seed))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for seed in range(3):
        save_photo(tmp_path / "photos", seed)
    return tmp_path / "photos"


def build(photos: Path, home: Path, photo_cache: Path | None) -> tuple[Artifact, Artifact]:
    store, runtime = Store(home), Runtime(photo_cache=photo_cache)
    cut, _ = store.build(patches.STAGE, CUT, {"photos": photo_source(photos)}, runtime)
    described, _ = store.build(embeddings.STAGE, VGG, {"patches": cut}, runtime)
    return cut, described


def test_only_what_is_new_is_scored_and_embedded_and_nothing_else_changes(photos: Path, tmp_path: Path, monkeypatch) -> None:
    photo_cache = tmp_path / "photo_cache"
    build(photos, tmp_path / "first", photo_cache)
    old = known(photo_cache)

    save_photo(photos, 3)
    (photos / "0.png").unlink()
    scored, embedded = [], []
    score, embed = scoring.score_windows, embedders.embed_images
    monkeypatch.setattr(scoring, "score_windows", lambda *a: scored.append(1) or score(*a))
    monkeypatch.setattr(embedders, "embed_images", lambda images, *a: embedded.append(len(images)) or embed(images, *a))
    with_cache = build(photos, tmp_path / "second", photo_cache)
    assert len(scored) == 1
    assert with_cache[0].manifest.counts["from_photo_cache"] == 2
    patches_now = set(read_table(with_cache[1].path)[0]["patch_id"].to_pylist())
    assert known(photo_cache) == patches_now
    assert old - patches_now  # those of the photo that is gone
    assert with_cache[1].manifest.counts["from_photo_cache"] == len(patches_now & old)
    new = len(patches_now - old)
    assert 0 < new < len(patches_now)
    assert len(embedded) == -(-new // VGG.batch_size)

    without = build(photos, tmp_path / "third", None)
    assert [item.digest for item in without] == [item.digest for item in with_cache]
    assert [item.key for item in without] == [item.key for item in with_cache]


def known(photo_cache: Path) -> set[str]:
    """Patches whose vectors a photo_cache holds."""
    table, _ = read_table(next((photo_cache / "embeddings").iterdir()))
    return set(table["patch_id"].to_pylist())


def test_nothing_new_is_nothing_embedded(photos: Path, tmp_path: Path, monkeypatch) -> None:
    build(photos, tmp_path / "first", tmp_path / "photo_cache")
    monkeypatch.setattr(embeddings, "load_embedder", lambda *_: pytest.fail("there is nothing to embed"))
    _, described = build(photos, tmp_path / "second", tmp_path / "photo_cache")
    assert described.manifest.counts["from_photo_cache"] == described.manifest.counts["patches"]


def test_another_config_knows_nothing(photos: Path, tmp_path: Path) -> None:
    photo_cache = tmp_path / "photo_cache"
    cut, _ = build(photos, tmp_path / "home", photo_cache)
    other = VGG.model_copy(update={"image_px": 64})
    described, _ = Store(tmp_path / "home").build(
        embeddings.STAGE, other, {"patches": cut}, Runtime(photo_cache=photo_cache)
    )
    assert described.manifest.counts["from_photo_cache"] == 0
    assert len(list((photo_cache / "embeddings").iterdir())) == 1


def test_a_photo_cache_may_be_removed(photos: Path, tmp_path: Path) -> None:
    first = build(photos, tmp_path / "first", tmp_path / "photo_cache")
    shutil.rmtree(tmp_path / "photo_cache")
    second = build(photos, tmp_path / "second", tmp_path / "photo_cache")
    assert [item.digest for item in first] == [item.digest for item in second]


def test_a_damaged_table_is_removed_and_rebuilt(photos: Path, tmp_path: Path, caplog) -> None:
    """As one whose creation was interrupted."""
    photo_cache = tmp_path / "photo_cache"
    first = build(photos, tmp_path / "first", photo_cache)
    for manifest in photo_cache.rglob("_versions/*"):
        manifest.unlink()
    second = build(photos, tmp_path / "second", photo_cache)
    assert "all patches are embedded again" in caplog.text
    assert second[1].digest == first[1].digest
    assert len(known(photo_cache)) == first[1].manifest.counts["patches"]


def test_scores_and_vectors_that_are_not_what_was_written_are_computed_again(photos: Path, tmp_path: Path, caplog) -> None:
    photo_cache = tmp_path / "photo_cache"
    first = build(photos, tmp_path / "first", photo_cache)
    scores = next((photo_cache / "scores").rglob("*.json"))
    scores.write_bytes(scores.read_bytes().replace(b"1", b"2"))
    folder = next((photo_cache / "embeddings").iterdir())
    columns, vectors = read_table(folder)
    vectors = vectors.copy()
    vectors[0, 0] += 1
    write_table(folder, [(columns, vectors)])
    second = build(photos, tmp_path / "second", photo_cache)
    assert [item.digest for item in second] == [item.digest for item in first]
    assert second[0].manifest.counts["from_photo_cache"] == 2
    assert "all patches are embedded again (a row is not what was written)" in caplog.text
    third = build(photos, tmp_path / "third", photo_cache)
    assert third[0].manifest.counts["from_photo_cache"] == 3
    assert third[1].manifest.counts["from_photo_cache"] == third[1].manifest.counts["patches"]
