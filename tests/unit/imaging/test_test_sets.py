"""Layouts of published test sets: what is an HR image, and whose LR image is whose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ddsr_core.errors import ChangedInputError, InputError
from ddsr_core.imaging.images import encode_png, save_png
from ddsr_core.imaging.photos import photo_source
from ddsr_core.imaging.test_sets import find_pairs, pinned_pairs


def put(folder: Path, *names: str, size: tuple[int, int] = (64, 48)) -> None:
    for name in names:
        save_png(folder / name, np.zeros((size[1], size[0], 3), np.uint8))


def names(folder: Path, scale: int = 4) -> list[tuple[str, str | None]]:
    return [(pair.hr.name, pair.lr.name if pair.lr else None) for pair in find_pairs(folder, scale)]


@pytest.mark.parametrize(
    ("hr", "lr", "suffix"),
    [
        ("HR", "LRx4", ""),
        ("HR", "LR_bicubic/X4", "x4"),
        ("HR", "LR", ""),
        ("GTmod12", "LRbicx4", ""),
        ("DIV2K_valid_HR", "DIV2K_valid_LR_bicubic/X4", "x4"),
    ],
)
def test_folders_of_pairs(tmp_path: Path, hr: str, lr: str, suffix: str) -> None:
    put(tmp_path / hr, "a.png", "sub/b.png")
    put(tmp_path / lr, f"a{suffix}.png", f"sub/b{suffix}.png", size=(16, 12))
    assert names(tmp_path) == [("a.png", f"a{suffix}.png"), ("sub/b.png", f"sub/b{suffix}.png")]
    assert find_pairs(tmp_path)[0].hr.read().shape == (48, 64, 3)


def test_pairs_of_another_scale_give_their_hr_images(tmp_path: Path) -> None:
    put(tmp_path / "HR", "a.png")
    put(tmp_path / "LR_bicubic" / "X2", "ax2.png", size=(32, 24))
    assert names(tmp_path) == [("a.png", None)]
    assert names(tmp_path, scale=2) == [("a.png", "ax2.png")]


def test_files_of_one_folder_told_apart_by_srf(tmp_path: Path) -> None:
    for kind, size in {"HR": (64, 48), "LR": (16, 12), "SRCNN": (64, 48), "bicubic": (64, 48)}.items():
        put(tmp_path / "image_SRF_4", f"img_001_SRF_4_{kind}.png", f"img_002_SRF_4_{kind}.png", size=size)
    put(tmp_path / "image_SRF_2", "img_001_SRF_2_HR.png")
    below = [(f"img_00{i}_SRF_4_HR.png", f"img_00{i}_SRF_4_LR.png") for i in (1, 2)]
    assert names(tmp_path / "image_SRF_4") == below
    assert names(tmp_path) == [(f"image_SRF_4/{hr}", f"image_SRF_4/{lr}") for hr, lr in below]
    assert names(tmp_path, scale=2) == [("image_SRF_2/img_001_SRF_2_HR.png", None)]
    with pytest.raises(InputError, match="the pairs are for x2, x4, not x3"):
        find_pairs(tmp_path, scale=3)


def test_ost300_without_its_segmentations(tmp_path: Path) -> None:
    put(tmp_path / "OutdoorSceneTest300", "OST_001.png", "OST_002.png", size=(45, 37))
    put(tmp_path / "OutdoorSceneTest300_anno", "OST_001.png", "OST_002.png")
    assert [hr for hr, _ in names(tmp_path)] == [f"OutdoorSceneTest300/OST_00{i}.png" for i in (1, 2)]
    assert [hr for hr, _ in names(tmp_path / "OutdoorSceneTest300")] == ["OST_001.png", "OST_002.png"]


def test_images_without_a_partner_are_named(tmp_path: Path) -> None:
    put(tmp_path / "HR", "a.png", "b.png", "c.png", "d.png", "e.png")
    put(tmp_path / "LRx4", "a.png", "f.png", size=(16, 12))
    with pytest.raises(InputError, match=r"no LR partner for b, c, d and 1 more; no HR partner for f"):
        find_pairs(tmp_path)


def test_sizes_that_do_not_belong_together(tmp_path: Path) -> None:
    put(tmp_path / "HR", "a.png", size=(67, 50))
    put(tmp_path / "LRx4", "a.png", size=(16, 12))
    assert len(find_pairs(tmp_path)) == 1  # three and two pixels more: what cutting to a multiple leaves
    put(tmp_path / "HR", "a.png", size=(68, 48))
    with pytest.raises(InputError, match=r"LR 16x12 is not HR 68x48 divided by 4\n  where: a\.png"):
        find_pairs(tmp_path)
    assert len(find_pairs(tmp_path, mod_crop=8)) == 1
    put(tmp_path / "HR", "a.png", size=(60, 48))
    with pytest.raises(InputError, match="LR 16x12 is not HR 60x48"):
        find_pairs(tmp_path, mod_crop=8)


def test_sizes_are_those_seen_with_exif_orientation(tmp_path: Path) -> None:
    (tmp_path / "HR").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((64, 48, 3), np.uint8)).save(tmp_path / "HR" / "a.png", exif=exif)
    put(tmp_path / "LRx4", "a.png", size=(16, 12))
    assert find_pairs(tmp_path)[0].hr.read().shape == (48, 64, 3)


def test_what_cannot_be_read_is_left_for_its_turn(tmp_path: Path) -> None:
    put(tmp_path / "LRx4", "a.png", size=(16, 12))
    (tmp_path / "HR").mkdir()
    (tmp_path / "HR" / "a.png").write_bytes(b"no image")
    pair = find_pairs(tmp_path)[0]
    with pytest.raises(InputError, match="not a readable image"):
        pair.hr.read()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "I;16", "1"])
def test_every_kind_of_image_becomes_rgb(tmp_path: Path, mode: str) -> None:
    gray = np.arange(64, dtype=np.uint8).repeat(64).reshape(64, 64) * 4
    image = Image.fromarray(gray.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(gray).convert(mode)
    image.save(tmp_path / "a.png")
    read = find_pairs(tmp_path)[0].hr.read()
    assert (read.shape, read.dtype) == ((64, 64, 3), np.uint8)
    if mode != "1":
        assert np.array_equal(read[..., 0], gray)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images"):
        find_pairs(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        find_pairs(tmp_path / "gone")


@pytest.mark.parametrize("changed", ["HR/b.png", "LRx4/a.png"])
def test_pinned_pairs_are_those_of_the_digest(tmp_path: Path, changed: str) -> None:
    put(tmp_path / "HR", "a.png", "b.png")
    put(tmp_path / "LRx4", "a.png", "b.png", size=(16, 12))
    pinned = pinned_pairs(tmp_path)
    assert pinned.digest == photo_source(tmp_path).digest
    assert [(pair.hr.name, pair.hr.read().shape, pair.lr and pair.lr.read().shape) for pair in pinned.pairs] == [
        ("a.png", (48, 64, 3), (12, 16, 3)), ("b.png", (48, 64, 3), (12, 16, 3))
    ]  # fmt: skip
    save_png(tmp_path / changed, np.ones((48, 64, 3), np.uint8))
    photos = {"HR/b.png": pinned.pairs[1].hr, "LRx4/a.png": pinned.pairs[0].lr}
    with pytest.raises(ChangedInputError, match="changed during the run"):
        photos[changed].read()


def test_pinned_pairs_of_linked_folders_and_of_damaged_photos(tmp_path: Path) -> None:
    put(tmp_path / "originals", "a.png")
    (tmp_path / "originals/b.png").write_bytes(b"damaged")
    (tmp_path / "originals/gone.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "HR").symlink_to("originals")
    a, b, gone = (pair.hr for pair in pinned_pairs(tmp_path).pairs)
    assert a.read().shape == (48, 64, 3)
    for photo in (b, gone):
        with pytest.raises(InputError, match="not a readable image") as unusable:
            photo.read()
        assert not isinstance(unusable.value, ChangedInputError)
    put(tmp_path / "originals", "b.png")
    with pytest.raises(ChangedInputError):
        b.read()


def test_pinned_rows_of_parquet_may_have_one_name(tmp_path: Path) -> None:
    images = [np.full((12, 12, 3), level, np.uint8) for level in (0, 100, 200)]
    rows = [{"bytes": encode_png(image), "path": "same.png"} for image in images]
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet")
    pinned = pinned_pairs(tmp_path / "a.parquet")
    assert [int(pair.hr.read().max()) for pair in pinned.pairs] == [0, 100, 200]
    assert pinned.digest == photo_source(tmp_path / "a.parquet").digest
