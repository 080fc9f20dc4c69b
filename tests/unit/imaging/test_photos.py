"""Photo sources: what they contain, in which order, and what identifies them."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from ddsr_core.errors import InputError
from ddsr_core.imaging.decode import HEIF, UnusableImage
from ddsr_core.imaging.image_sets import write_image_parquet
from ddsr_core.imaging.images import encode_png, save_png
from ddsr_core.imaging.photos import find_images, iter_photos, photo_source
from ddsr_core.storage.store import Store

COLORS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def test_folders_are_searched_in_a_fixed_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.png", "a.JPG", "b/10.png", ".thumbs/x.png"):
        save_png(tmp_path / name, COLORS)
    (tmp_path / "notes.txt").write_text("Photos of 2019, taken in the Alps")
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


def names(source: Path | str) -> dict[str, str]:
    """Name of each photo, and the reason why it cannot be used (empty if it can)."""
    entries = {}
    for photo in iter_photos(source):
        try:
            photo.read()
            entries[photo.name] = ""
        except UnusableImage as error:
            entries[photo.name] = error.reason
    return entries


def test_content_decides_and_not_the_suffix_alone(tmp_path: Path) -> None:
    for number, (name, kind) in enumerate(
        [("a.jfif", "JPEG"), ("b.jpe", "JPEG"), ("c.avif", "AVIF"), ("d.jp2", "JPEG2000"), ("e.tga", "TGA"),
         ("f.ppm", "PPM"), ("no-suffix", "PNG"), ("g.dat", "WEBP")]
    ):  # fmt: skip
        Image.fromarray(np.roll(COLORS, number, 0)).save(tmp_path / name, kind)
    (tmp_path / "empty.png").touch()
    (tmp_path / "list.csv").write_text("a,b\n1,2\n" * 10)
    entries = names(tmp_path)
    assert entries.pop("empty.png") == "unreadable: not an image of a known format"
    assert set(entries.values()) == {""}
    assert set(entries) == {"a.jfif", "b.jpe", "c.avif", "d.jp2", "e.tga", "f.ppm", "no-suffix", "g.dat"}


def test_what_looks_like_a_photo_and_cannot_be_used_is_counted_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "IMG_1.dng").write_bytes(b"II*\0" + bytes(100))
    (tmp_path / "IMG_2.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "server.png"))
    entries = names(tmp_path)
    assert entries["IMG_1.dng"] == "unsupported: .dng"
    assert entries["IMG_2.HEIC"] in ("unsupported: .heic", "unreadable: not an image of a known format")
    assert entries["pipe.png"] == entries["server.png"] == "not a regular file"
    assert entries["gone.jpg"] == "unreadable: broken link"
    assert find_images(tmp_path) == [] or HEIF
    assert photo_source(tmp_path).digest == photo_source(tmp_path).digest


def test_a_folder_without_permission_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(tmp_path / "a.png", COLORS)
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(path: Path) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert names(tmp_path) == {"a.png": "", "locked": "unreadable: folder: Permission denied"}


def test_linked_folders_are_walked_and_loops_end(tmp_path: Path) -> None:
    save_png(tmp_path / "disk/alps/1.png", COLORS)
    save_png(tmp_path / "photos/own/2.png", COLORS[::-1].copy())
    (tmp_path / "photos/alps").symlink_to(tmp_path / "disk/alps")
    (tmp_path / "photos/alps-again").symlink_to(tmp_path / "disk/alps")
    (tmp_path / "photos/a-link-to-own").symlink_to(tmp_path / "photos/own")
    (tmp_path / "photos/own/up").symlink_to(tmp_path / "photos")
    (tmp_path / "disk/alps/around").symlink_to(tmp_path / "photos")
    assert list(names(tmp_path / "photos")) == ["alps/1.png", "own/2.png"]


def test_what_lies_below_a_home_is_never_a_photo(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", COLORS)
    before = photo_source(tmp_path).digest
    save_png(tmp_path / "ddsr-home/runs/demo/distilled/0.png", COLORS)
    Store(tmp_path / "ddsr-home").check()
    (tmp_path / "results").symlink_to(tmp_path / "ddsr-home/runs")
    (tmp_path / "copy.png").symlink_to(tmp_path / "ddsr-home/runs/demo/distilled/0.png")
    assert photo_source(tmp_path).digest == before
    assert [photo.name for photo in iter_photos(f"{tmp_path}/**/*.png")] == [f"{tmp_path}/a.png"]
    assert list(names(tmp_path / "ddsr-home/runs/demo/distilled")) == ["0.png"]  # where it is named


def test_a_home_that_is_the_folder_of_photos_itself(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", COLORS)
    save_png(tmp_path / "trip/b.png", COLORS)
    before = photo_source(tmp_path).digest
    save_png(tmp_path / "artifacts/sample/0123456789abcdef0123456789abcdef/images/0.png", COLORS)
    save_png(tmp_path / "runs/demo/distilled/0.png", COLORS)
    Store(tmp_path).check()
    assert photo_source(tmp_path).digest == before


def test_names_of_any_bytes_are_escaped(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", COLORS)
    os.rename(os.fsencode(tmp_path) + b"/a.png", os.fsencode(tmp_path) + b"/Caf\xe9.png")
    (photo,) = iter_photos(tmp_path)
    assert photo.name == "Caf\\xe9.png"
    np.testing.assert_array_equal(photo.read(), COLORS)
    assert len(photo_source(tmp_path).digest) == 64
