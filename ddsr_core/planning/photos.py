"""The sizes of photos, from their headers: nothing is decoded."""

from __future__ import annotations

import io
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from ddsr_core.errors import ConfigError, InputError
from ddsr_core.imaging.photos import Photo, iter_photos
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


#: Photos whose headers are read for an estimate.
SAMPLED = 200


def sampled_sizes(photos: Path, most: int = SAMPLED) -> Sizes:
    """Heights and widths of all photos of a source, spread like those of at most ``most`` of them that are looked at.

    Raises:
        InputError: there is no such source.
    """
    found = list(iter_photos(photos))
    stride = max(1, -(-len(found) // most))
    seen: Sizes = Counter(size for photo in found[::stride] if (size := _size_in_file(photo)) is not None)
    return Counter({size: round(count * len(found) / len(found[::stride])) for size, count in seen.items()})


def _size_in_file(photo: Photo) -> tuple[int, int] | None:
    """As `_size`, without reading the whole file."""
    try:
        if photo.path is None:
            return _size(photo.load())
        with photo.path.open("rb") as file:
            return _size(file)
    except OSError:
        return None


def _size(data: bytes | BinaryIO) -> tuple[int, int] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
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
