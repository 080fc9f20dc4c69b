"""Decoding: every kind of file that users have, and every kind of damage."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ddsr_core.errors import InputError
from ddsr_core.imaging.decode import decode_rgb
from ddsr_core.imaging.image_sets import (
    finish_image_set,
    image_set_name,
    read_image_parquet,
    read_image_set,
    write_image_parquet,
)
from ddsr_core.imaging.images import encode_png, save_png, to_float, to_uint8
from ddsr_core.imaging.photos import find_images, iter_photos, photo_source

COLORS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_png_round_trip_is_exact_and_its_bytes_are_always_the_same():
    assert encode_png(COLORS) == encode_png(COLORS.copy())
    np.testing.assert_array_equal(decode_rgb(encode_png(COLORS), "x"), COLORS)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decode_rgb(encoded(Image.fromarray(COLORS), "JPEG", exif=exif), "x").shape == (20, 12, 3)


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA"])
def test_every_mode_becomes_rgb(mode: str):
    assert decode_rgb(encoded(Image.fromarray(COLORS).convert(mode)), mode).shape == (12, 20, 3)


def test_cmyk_becomes_rgb():
    assert decode_rgb(encoded(Image.fromarray(COLORS).convert("CMYK"), "JPEG"), "x").shape == (12, 20, 3)


def test_sixteen_bit_gray_is_scaled_not_cut():
    wide = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert decode_rgb(encoded(wide), "x")[0, :, 0].tolist() == [0, 100, 255]


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (3, 2), (10, 20, 30, 0))
    assert decode_rgb(encoded(clear), "x").min() == 255


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode_rgb(data, "x")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("data", [b"", b"not an image", encode_png(COLORS)[:-40], encode_png(COLORS)[:30]])
def test_damage_is_named(data: bytes):
    with pytest.raises(InputError) as caught:
        decode_rgb(data, "holiday.jpg")
    assert "holiday.jpg" in str(caught.value)


def test_too_many_pixels_are_refused_before_decoding():
    with pytest.raises(InputError, match="too large: 20x12"):
        decode_rgb(encode_png(COLORS), "x", max_pixels=100)


def test_conversions_are_inverse_and_rounded():
    x = to_float(COLORS)
    assert x.shape == (1, 3, 12, 20)
    np.testing.assert_array_equal(to_uint8(x)[0], COLORS)
    assert to_uint8(x * 0 + 2.0).max() == 255


def test_folders_are_searched_in_a_fixed_order_without_hidden_files(tmp_path: Path):
    for name in ("b/2.png", "a.JPG", "b/10.png", ".thumbs/x.png", "notes.txt"):
        save_png(tmp_path / name, COLORS)
    assert [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path)] == ["a.JPG", "b/10.png", "b/2.png"]


def test_a_source_is_known_by_content_not_by_place_or_age(tmp_path: Path):
    for folder in ("one", "two"):
        save_png(tmp_path / folder / "a.png", COLORS)
    first = photo_source(tmp_path / "one").digest
    assert first == photo_source(tmp_path / "two").digest
    save_png(tmp_path / "two" / "a.png", COLORS[::-1].copy())
    assert first != photo_source(tmp_path / "two").digest


def test_a_glob_and_a_parquet_file_are_sources_too(tmp_path: Path):
    save_png(tmp_path / "a.png", COLORS)
    assert [photo.name for photo in iter_photos(f"{tmp_path}/*.png")] == [f"{tmp_path}/a.png"]
    write_image_parquet(tmp_path / "set.parquet", [{"image": encode_png(COLORS), "n": 1}], {"n": pa.int32()})
    (photo,) = iter_photos(tmp_path / "set.parquet")
    np.testing.assert_array_equal(photo.read(), COLORS)


@pytest.mark.parametrize("make", [True, False])
def test_nothing_to_read_is_said(tmp_path: Path, make: bool):
    folder = tmp_path / "photos"
    if make:
        folder.mkdir()
    with pytest.raises(InputError) as caught:
        photo_source(folder)
    assert str(folder) in str(caught.value)


def test_parquet_without_images_is_refused(tmp_path: Path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="no column `image`"):
        list(read_image_parquet(tmp_path / "x.parquet"))
    (tmp_path / "y.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(InputError, match="not a readable Parquet"):
        list(read_image_parquet(tmp_path / "y.parquet"))


def test_image_sets_open_as_imagefolder_and_declare_their_image_feature(tmp_path: Path):
    for index in range(2):
        save_png(tmp_path / image_set_name(index), COLORS)
    finish_image_set(tmp_path, [{"label": 3}, {"label": 4}], {"label": pa.int32()})
    assert read_image_set(tmp_path)[1] == {"file_name": "images/000001.png", "label": 4}
    schema = pq.read_schema(tmp_path / "images.parquet")
    assert json.loads(schema.metadata[b"huggingface"])["info"]["features"]["image"] == {"_type": "Image"}
