"""Decoding: every kind of file that users have, and every kind of damage."""

from __future__ import annotations

import io
import struct
import zlib
from multiprocessing import Pipe

import cv2
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from ddsr_core.errors import InputError
from ddsr_core.imaging.decode import UnusableImage, decode_picture, decode_rgb, image_size, plain_reason
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


def tiff(samples: np.ndarray) -> bytes:
    return encoded(Image.fromarray(samples), "TIFF")


def exif_jpeg(entries: list[tuple[int, int, int, bytes]], extra: bytes = b"", block: bytes | None = None) -> bytes:
    """A JPEG of `COLORS` with an EXIF block of these entries: tag, type, count, 4 bytes of value."""
    if block is None:
        table = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHI", *e[:3]) + e[3] for e in entries) + bytes(4)
        block = b"Exif\0\0II*\0" + struct.pack("<I", 8) + table + extra
    return encoded(Image.fromarray(COLORS), "JPEG", quality=95, exif=block)


ON_ITS_SIDE = (0x0112, 3, 1, struct.pack("<HH", 6, 0))


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        (exif_jpeg([ON_ITS_SIDE, (0x9204, 10, 1, struct.pack("<I", 38))], struct.pack("<ii", -1, 0)), (20, 12, 3)),
        (exif_jpeg([ON_ITS_SIDE, (0x011A, 5, 2, struct.pack("<I", 38))], struct.pack("<IIII", 72, 1, 72, 1)), (20, 12, 3)),
        (exif_jpeg([ON_ITS_SIDE, (0x02BC, 5, 1, struct.pack("<I", 38))], struct.pack("<II", 1, 1)), (20, 12, 3)),
        (exif_jpeg([ON_ITS_SIDE, (0x011A, 2, 3, b"72\0\0")]), (20, 12, 3)),
        (exif_jpeg([ON_ITS_SIDE, (0x927C, 0, 3, b"abcd")]), (20, 12, 3)),
        (exif_jpeg([ON_ITS_SIDE, (0x010F, 2, 400, struct.pack("<I", 60_000))]), (20, 12, 3)),
        (exif_jpeg([(0x0112, 2, 2, b"6\0\0\0")]), (12, 20, 3)),
        (exif_jpeg([(0x0112, 3, 1, struct.pack("<HH", 9, 0))]), (12, 20, 3)),
        (exif_jpeg([], block=b"Exif\0\0"), (12, 20, 3)),
        (exif_jpeg([], block=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01"), (12, 20, 3)),
    ],
    ids=["-1/0", "two resolutions", "rational as bytes", "resolution as text", "type 0", "beyond the end", "text", "9",
         "blank", "cut off"],
)  # fmt: skip
def test_damaged_exif_data_leaves_the_photo_readable(data: bytes, shape: tuple[int, ...]) -> None:
    assert decode_rgb(data, "x").shape == shape
    assert image_size(data) == (shape[1], shape[0])


GRAY = COLORS[..., 0].copy()


@pytest.mark.parametrize(
    "data",
    [
        tiff((GRAY / np.float32(255)).astype(np.float32)),
        tiff(np.maximum(GRAY, 16).astype(np.float32)),
        tiff(GRAY.astype(np.float32) * 257),
        tiff(GRAY.astype(np.uint16) * 257),
        tiff(GRAY.astype(np.uint16) * 16),
        encoded(Image.fromarray(GRAY.astype(np.uint16) * 16)),
        tiff(GRAY.astype(np.int32) * 257),
    ],
    ids=["float 0 to 1", "float to 255", "float to 65535", "16 bits", "12 bits in 16", "PNG, 12 bits in 16", "32 bits"],
)
def test_deep_samples_are_scaled_by_a_stated_rule(data: bytes) -> None:
    gray = decode_rgb(data, "x")[..., 0]
    assert np.abs(gray.astype(int) - np.maximum(GRAY, gray.min())).max() <= 1


@pytest.mark.parametrize(
    "samples",
    [
        (GRAY / 255).astype(np.float32) * 1.5,
        GRAY.astype(np.float32) * 2,
        GRAY.astype(np.float32) - 3,
        np.where(GRAY == 3, np.nan, GRAY).astype(np.float32),
        GRAY.astype(np.int32) * 100_000,
        GRAY.astype(np.uint16),
        -GRAY.astype(np.int32),
    ],
    ids=["1.5", "510", "negative", "NaN", "32 bits", "8 bits in 16", "negative integers"],
)
def test_samples_of_unknown_range_are_refused_with_the_reason(samples: np.ndarray) -> None:
    with pytest.raises(UnusableImage, match="unknown range of samples") as caught:
        decode_rgb(tiff(samples), "scan.tif")
    assert caught.value.where == "scan.tif"


def test_twelve_bits_in_color_of_sixteen_are_refused_and_never_black() -> None:
    for suffix in (".png", ".tiff"):
        data = cv2.imencode(suffix, COLORS.astype(np.uint16) * 16)[1].tobytes()
        with pytest.raises(UnusableImage, match="upper 4 are not used"):
            decode_rgb(data, "x")
        data = cv2.imencode(suffix, COLORS[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
        np.testing.assert_array_equal(decode_rgb(data, "x"), COLORS)


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), TypeError("int() argument"), struct.error("4 bytes"), KeyError(1), MemoryError()]
)
def test_whatever_a_decoder_raises_is_a_reason(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(PngImageFile, "load", fail)
    for decode in (decode_rgb, decode_picture):
        with pytest.raises(UnusableImage, match="not a readable image") as caught:
            decode(encode_png(COLORS), "a.png")
        assert caught.value.reason.startswith("unreadable: ")


def test_reasons_do_not_change_from_run_to_run_and_travel_between_processes() -> None:
    with pytest.raises(UnusableImage) as caught:
        decode_rgb(b"not an image", "x")
    assert caught.value.reason == "unreadable: not an image of a known format"
    assert plain_reason(ValueError("bad <_io.BytesIO object at 0x7f12ab> at 0x7f12ab")) == "bad"
    receiver, sender = Pipe(duplex=False)
    sender.send(caught.value)
    again = receiver.recv()
    assert (again.reason, again.what, again.where, again.fix) == (
        caught.value.reason, caught.value.what, caught.value.where, caught.value.fix,
    )  # fmt: skip


def test_a_panorama_beyond_pillows_own_limit_is_too_large_and_not_damaged() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_992, 10_496, 8, 2, 0, 0, 0))
    with pytest.raises(UnusableImage, match="too large: more than 178 megapixels") as caught:
        decode_rgb(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""), "x")
    assert caught.value.reason.startswith("too large")


def test_a_picture_keeps_its_transparency_and_colors_below_it() -> None:
    layer = np.dstack([COLORS, COLORS[..., 0]])
    picture = decode_picture(encoded(Image.fromarray(layer)), "x")
    np.testing.assert_array_equal(picture.rgb, COLORS)
    assert picture.alpha is not None
    np.testing.assert_array_equal(picture.alpha, COLORS[..., 0])
    assert decode_picture(encode_png(COLORS), "x").alpha is None
