"""Search: hand-made vectors, queries by image and by words, and the patches behind the hits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from ddsr_core.config import Runtime
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.imaging.images import save_png
from ddsr_core.pseudo_labels.config import EmbeddingsConfig
from ddsr_core.pseudo_labels.embedders import OpenClipEmbedder
from ddsr_core.pseudo_labels.embeddings import run
from ddsr_core.pseudo_labels.search import image_query, read_patches, search, text_query
from ddsr_core.storage.vector_table import write_table
from tests.unit.pseudo_labels.test_embeddings import VGG, patches, textures, tiny  # noqa: F401


@pytest.fixture
def table(tmp_path: Path) -> Path:
    vectors = np.array([[3, 0], [1, 1], [0, 2], [-1, 0], [5, 5]], np.float32)
    columns = pa.table(
        {
            "patch_id": list("abcde"),
            "psnr_bic": np.arange(5, dtype=np.float32),
            "photo": [f"{index}.png" for index in range(5)],
            "pseudo_label": pa.array([0, 1, 2, 3, 11], pa.int32()),
        }
    )
    write_table(tmp_path / "table", [(columns, vectors)])
    return tmp_path / "table"


def test_hits_are_sorted_by_cosine(table: Path) -> None:
    hits = search(table, np.array([1.0, 0.0]), k=10)
    assert [hit.patch_id for hit in hits] == ["a", "b", "e", "c", "d"]
    np.testing.assert_allclose([hit.cosine for hit in hits], [1, 0.5**0.5, 0.5**0.5, 0, -1], atol=1e-6)
    assert (hits[2].photo, hits[2].psnr_bic, hits[2].pseudo_label) == ("4.png", 4.0, 11)


def test_k_hits_and_the_length_of_the_query_does_not_matter(table: Path) -> None:
    assert search(table, np.array([0.0, 0.1]), k=2) == search(table, np.array([0.0, 100.0]), k=2)
    assert len(search(table, np.array([0.0, 1.0]), k=2)) == 2


@pytest.mark.parametrize(
    ("query", "message"),
    [([1.0, 2.0, 3.0], "3 numbers, the table's vectors have 2"), ([0.0, 0.0], "zero"), ([np.nan, 1.0], "not finite")],
)
def test_queries_that_cannot_be_answered(table: Path, query: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        search(table, np.array(query))


def test_a_patch_finds_itself_by_its_image(patches: Path, tmp_path: Path) -> None:  # noqa: F811
    run(VGG, patches=patches, out=tmp_path / "out", runtime=Runtime())
    save_png(tmp_path / "query.png", textures(8)[5])
    hits = search(tmp_path / "out", image_query(tmp_path / "query.png", VGG), k=3)
    assert hits[0].patch_id == "p5"
    assert hits[0].cosine == pytest.approx(1, abs=1e-5)
    assert hits[0].pseudo_label is None
    assert hits[1].cosine < 0.999


def test_words_find_the_nearest_in_open_clips_space(tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    config = EmbeddingsConfig(model="tiny", weights=str(tiny))
    query = text_query("breaking waves", config)
    with torch.inference_mode():
        expected = OpenClipEmbedder("tiny", str(tiny)).eval().embed_texts(["breaking waves"])[0].numpy()
    np.testing.assert_allclose(query, expected / np.linalg.norm(expected), atol=1e-6)


def test_vgg16_knows_no_words() -> None:
    with pytest.raises(ConfigError, match="vgg16 embeddings cannot be searched by words"):
        text_query("breaking waves", VGG)


def test_patches_come_in_the_order_asked_for(patches: Path) -> None:  # noqa: F811
    found = read_patches(patches, ["p6", "p0", "p6"])
    images = textures(8)
    for image, index in zip(found, [6, 0, 6], strict=True):
        np.testing.assert_array_equal(image, images[index])
    with pytest.raises(InputError, match="such as q"):
        read_patches(patches, ["p1", "q"])
