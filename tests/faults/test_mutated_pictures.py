"""Damaged picture files: each one is a picture or one plain reason, the same in every run; never another exception.

2,000 mutations by default; DDSR_MUTATIONS sets another number, DDSR_MUTATION_SEED other ones.
"""

from __future__ import annotations

import io
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddsr_core.imaging.decode import UnusableImage, decode_picture, decode_rgb, image_size, picture_memory
from ddsr_core.imaging.photos import iter_photos

MUTATIONS = int(os.environ.get("DDSR_MUTATIONS", "2000"))
SEED = int(os.environ.get("DDSR_MUTATION_SEED", "0"))
#: Files are small, and a decoder that takes this long hangs.
SECONDS_PER_FILE = 20


def scene(seed: int, mode: str) -> Image.Image:
    """24 x 32 pixels of waves and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:24, :32]
    gray = 128 + 60 * np.sin(x / 3 + y / 5) + rng.normal(0, 12, (24, 32))
    image = Image.fromarray(np.clip(np.dstack([gray, gray[::-1], gray.T.reshape(24, 32)]), 0, 255).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((np.clip(gray, 0, 255) * 257).astype(np.uint16))
    if mode == "F":
        return Image.fromarray((np.clip(gray, 0, 255) / 255).astype(np.float32))
    return image.convert(mode)


def sound_files() -> dict[str, bytes]:
    """A sound file of each kind."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    kinds: list[tuple[str, str, str, dict[str, object]]] = [
        ("png", "PNG", "RGB", {}),
        ("png-alpha-exif", "PNG", "RGBA", {"exif": exif}),
        ("png-palette", "PNG", "P", {}),
        ("png-16", "PNG", "I;16", {}),
        ("jpeg-exif", "JPEG", "RGB", {"exif": exif, "quality": 90}),
        ("jpeg-progressive", "JPEG", "RGB", {"progressive": True}),
        ("jpeg-cmyk", "JPEG", "CMYK", {}),
        ("webp", "WEBP", "RGB", {"exif": exif}),
        ("webp-lossless", "WEBP", "RGBA", {"lossless": True}),
        ("bmp", "BMP", "RGB", {}),
        ("gif", "GIF", "P", {}),
        ("tiff", "TIFF", "RGB", {}),
        ("tiff-lzw", "TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("tiff-deflate-16", "TIFF", "I;16", {"compression": "tiff_adobe_deflate"}),
        ("tiff-float", "TIFF", "F", {}),
        ("tiff-jpeg", "TIFF", "RGB", {"compression": "jpeg"}),
        ("avif", "AVIF", "RGB", {"exif": exif}),
        ("jp2", "JPEG2000", "RGB", {}),
        ("ppm", "PPM", "RGB", {}),
        ("tga", "TGA", "RGB", {}),
        ("pcx", "PCX", "RGB", {}),
        ("sgi", "SGI", "RGB", {}),
    ]
    files = {}
    for seed, (name, format_name, mode, options) in enumerate(kinds):
        buffer = io.BytesIO()
        scene(seed, mode).save(buffer, format_name, **options)
        files[name] = buffer.getvalue()
    return files


FILES = sound_files()


def mutated(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """One to four random changes: bits, bytes, extreme numbers, a cut, a hole, something inserted, another file's rest."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        # Most of what decoders believe stands near the beginning.
        at = int(rng.integers(0, len(changed)) if rng.random() < 0.5 else rng.integers(0, min(128, len(changed))))
        match rng.integers(0, 8):
            case 0:
                changed[at] ^= 1 << int(rng.integers(0, 8))
            case 1:
                changed[at] = int(rng.integers(0, 256))
            case 2:
                changed[at : at + 4] = [b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\x01"][rng.integers(0, 4)]
            case 3:
                changed[at : at + 16] = rng.bytes(16)
            case 4:
                del changed[at + 1 :]
            case 5:
                del changed[at : at + int(rng.integers(1, 40))]
            case 6:
                changed[at:at] = rng.bytes(int(rng.integers(1, 40)))
            case _:
                changed[at:] = other[at:]
        if not changed:
            return b""
    return bytes(changed)


@contextmanager
def time_limit(seconds: int, what: str) -> Iterator[None]:
    def stop(*_: object) -> None:
        pytest.fail(f"{what}: a decoder hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(data: bytes) -> tuple[tuple[int, ...], bytes] | str:
    """Shape and pixels, or the reason."""
    try:
        image = decode_rgb(data, "x")
    except UnusableImage as error:
        return error.reason
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == 3
    return image.shape, image.tobytes()


@pytest.mark.parametrize("name", FILES)
def test_the_sound_files_are_pictures(name: str) -> None:
    image = decode_rgb(FILES[name], name)
    assert sorted(image.shape[:2]) == [24, 32]
    assert 90 < image.mean() < 170


@pytest.mark.parametrize("part", range(10))
def test_a_mutated_file_is_a_picture_or_one_plain_reason(part: int) -> None:
    names = list(FILES)
    for number in range(part, MUTATIONS, 10):
        rng = np.random.default_rng([SEED, number])
        name, other = (names[int(rng.integers(0, len(names)))] for _ in range(2))
        data = mutated(rng, FILES[name], FILES[other])
        with time_limit(SECONDS_PER_FILE, f"mutation {number} of {name}"), picture_memory(data):
            first = outcome(data)
            assert outcome(data) == first, f"mutation {number} of {name}"
            image_size(data)
            with suppress(UnusableImage):
                decode_picture(data, "x")
        if isinstance(first, str):
            assert first.strip()
            assert "\n" not in first
            assert not re.search(r"0x[0-9a-f]{6,}|object at", first), first


def test_a_folder_of_mutated_files_is_read_to_its_end(tmp_path: Path) -> None:
    names = list(FILES)
    for number in range(200):
        rng = np.random.default_rng([SEED, 1, number])
        data = mutated(rng, FILES[names[number % len(names)]], FILES[names[number // 3 % len(names)]])
        (tmp_path / f"{number:03d}.jpg").write_bytes(data)
    photos = list(iter_photos(tmp_path))
    assert len(photos) == 200
    reasons = []
    for photo in photos:
        try:
            photo.read()
        except UnusableImage as error:
            reasons.append(error.reason)
    assert 20 < len(reasons) < 180
    assert {reason.split(":")[0] for reason in reasons} <= {"unreadable", "too large", "unknown range of samples"}
