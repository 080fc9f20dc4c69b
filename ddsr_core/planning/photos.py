"""The sizes of photos, from their headers: nothing is decoded."""

from __future__ import annotations

import io
import re
import warnings
from collections import Counter
from pathlib import Path

from PIL import Image

from ddsr_core.errors import ConfigError, InputError
from ddsr_core.imaging.photos import iter_photos
from ddsr_core.planning.work import Sizes

_SIZES = re.compile(r"(\d+)@(\d+)x(\d+)")
_EXIF_ORIENTATION = 0x0112
#: Orientations from this one on are rotated by 90 degrees.
_ON_ITS_SIDE = 5


def sizes_of_photos(photos: Path) -> tuple[Sizes, int]:
    """Heights and widths of all photos of a source, and how many cannot be read.

    Raises:
        InputError: there are no photos.
    """
    sizes: Sizes = Counter()
    unreadable = 0
    for photo in iter_photos(photos):
        size = _size(photo.load())
        if size is None:
            unreadable += 1
        else:
            sizes[size] += 1
    if not sizes:
        raise InputError("no photos", where=photos, fix="name a folder of photos, or sizes such as 10000@1280x960")
    return sizes, unreadable


def _size(data: bytes) -> tuple[int, int] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            turned = image.getexif().get(_EXIF_ORIENTATION, 1) >= _ON_ITS_SIDE
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return (image.width, image.height) if turned else (image.height, image.width)


def parse_sizes(text: str) -> Sizes:
    """Sizes of photos that are not on this machine: ``COUNT@WIDTHxHEIGHT``, several with commas between them.

    >>> dict(parse_sizes("9000@1280x960,1000@2048x1536"))
    {(960, 1280): 9000, (1536, 2048): 1000}

    Raises:
        ConfigError: something else.
    """
    sizes: Sizes = Counter()
    for part in text.split(","):
        found = _SIZES.fullmatch(part.strip())
        if found is None:
            raise ConfigError(f"cannot read the sizes {part!r}", where="--sizes", fix="write COUNT@WIDTHxHEIGHT,…")
        count, width, height = map(int, found.groups())
        sizes[height, width] += count
    return sizes


def hold_out_sizes(sizes: Sizes, share: int) -> tuple[Sizes, Sizes]:
    """The sizes split into training and test photos as a run splits photos, one in ``share``: by count, not by content."""
    ordered = sorted(sizes.elements())
    tests = max(1, len(ordered) // share)
    stride = len(ordered) / tests
    held = {int(index * stride) for index in range(tests)}
    sides: tuple[Sizes, Sizes] = Counter(), Counter()
    for index, size in enumerate(ordered):
        sides[index in held][size] += 1
    return sides
