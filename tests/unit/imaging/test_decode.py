"""Decoding: every kind of file that users have, and every kind of damage."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ddsr_core.errors import InputError
from ddsr_core.imaging.decode import decode_rgb
from ddsr_core.imaging.images import encode_png

COLORS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decode_rgb(encoded(Image.fromarray(COLORS), "JPEG", exif=exif), "x").shape == (20, 12, 3)


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert decode_rgb(encoded(Image.fromarray(COLORS).convert(mode)), mode).shape == (12, 20, 3)


def test_cmyk_becomes_rgb() -> None:
    assert decode_rgb(encoded(Image.fromarray(COLORS).convert("CMYK"), "JPEG"), "x").shape == (12, 20, 3)


def test_sixteen_bit_gray_is_scaled_not_cut() -> None:
    wide = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert decode_rgb(encoded(wide), "x")[0, :, 0].tolist() == [0, 100, 255]


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (3, 2), (10, 20, 30, 0))
    assert decode_rgb(encoded(clear), "x").min() == 255


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode_rgb(data, "x")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("data", [b"", b"not an image", encode_png(COLORS)[:-40], encode_png(COLORS)[:30]])
def test_damage_is_named(data: bytes) -> None:
    with pytest.raises(InputError) as caught:
        decode_rgb(data, "holiday.jpg")
    assert "holiday.jpg" in str(caught.value)


def test_too_many_pixels_are_refused_before_decoding() -> None:
    with pytest.raises(InputError, match="too large: 20x12"):
        decode_rgb(encode_png(COLORS), "x", max_pixels=100)
