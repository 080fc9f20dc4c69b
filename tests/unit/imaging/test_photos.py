"""Photo sources: what they contain, in which order, and what identifies them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ddsr_core.errors import InputError
from ddsr_core.imaging.image_sets import write_image_parquet
from ddsr_core.imaging.images import encode_png, save_png
from ddsr_core.imaging.photos import find_images, iter_photos, photo_source

COLORS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def test_folders_are_searched_in_a_fixed_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.png", "a.JPG", "b/10.png", ".thumbs/x.png", "notes.txt"):
        save_png(tmp_path / name, COLORS)
    assert [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path)] == ["a.JPG", "b/10.png", "b/2.png"]


def test_a_source_is_known_by_content_not_by_place_or_age(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        save_png(tmp_path / folder / "a.png", COLORS)
    first = photo_source(tmp_path / "one").digest
    assert first == photo_source(tmp_path / "two").digest
    save_png(tmp_path / "two" / "a.png", COLORS[::-1].copy())
    assert first != photo_source(tmp_path / "two").digest


def test_a_glob_and_a_parquet_file_are_sources_too(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", COLORS)
    assert [photo.name for photo in iter_photos(f"{tmp_path}/*.png")] == [f"{tmp_path}/a.png"]
    write_image_parquet(tmp_path / "set.parquet", [{"image": encode_png(COLORS), "n": 1}], {"n": pa.int32()})
    (photo,) = iter_photos(tmp_path / "set.parquet")
    np.testing.assert_array_equal(photo.read(), COLORS)


@pytest.mark.parametrize("make", [True, False])
def test_nothing_to_read_is_said(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "photos"
    if make:
        folder.mkdir()
    with pytest.raises(InputError) as caught:
        photo_source(folder)
    assert str(folder) in str(caught.value)
