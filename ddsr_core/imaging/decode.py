"""Decoding untrusted image files to pixels, ``uint8 (H, W, 3)`` RGB, or to a plain reason for the failure.

Samples of more than 8 bits are converted by these rules. A file that fits none of them is rejected, so that no picture turns
black or white unnoticed.

==============================  =====================================================================
samples                         8-bit level
==============================  =====================================================================
gray of 16 bits                 the upper 8 bits; if all values are below 4096 (12 bits in 16), the
                                upper 8 of these 12; refused if all are below 256 and not all are 0
color of 16 bits                the upper 8 bits; refused if the upper 4 are not used
integers of 32 bits             as gray of 16 bits; refused if a value is negative or above 65535
floats, largest value up to 1   value x 255, rounded
floats, 16 to 255               value, rounded
floats, 4096 to 65535           value / 257, rounded
other floats                    refused: the range is not known
==============================  =====================================================================
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from ddsr_core.errors import InputError
from ddsr_core.parallel import MemoryBudget

try:
    import pillow_heif  # an optional extra: photos of phones
except ImportError:
    HEIF = False
else:
    pillow_heif.register_heif_opener()
    HEIF = True

Image.init()

#: Memory for decoding pictures and scoring their patches: per picture Pillow's copy, ours and two of floats.
MAX_PICTURE_BYTES = 2 << 30
BYTES_PER_PIXEL = 12
#: Larger images are refused (179 megapixels).
MAX_PIXELS = MAX_PICTURE_BYTES // BYTES_PER_PIXEL
#: Formats that are decoded. Others, such as EPS, need external programs or are not photos.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM", "TGA", "QOI", "SGI", "PCX", "HEIF")
_KNOWN_FORMATS = tuple(name for name in FORMATS if name in Image.OPEN)
NOT_READABLE = "not a readable image"

_MEMORY = MemoryBudget(MAX_PICTURE_BYTES)
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: Orientations from this one on exchange width and height.
_ON_ITS_SIDE = 5

# Pillow warns about damaged metadata, and about sizes that `MAX_PIXELS` checks.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class UnusableImage(InputError):
    """An image that is left out, with the reason.

    Attributes:
        reason: a kind, and details after a colon: ``unreadable: truncated``. It is the same in every run.
    """

    def __init__(self, what: str, *, where: object | None = None, fix: str | None = None, reason: str = "") -> None:
        super().__init__(what, where=where, fix=fix)
        self.reason = reason or what

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), where=self.where, fix=self.fix, reason=self.reason), (self.what,)


class Picture(NamedTuple):
    """A decoded image with what `decode_rgb` drops.

    Attributes:
        rgb: ``uint8 (H, W, 3)``; below transparency, the stored colors.
        alpha: ``uint8 (H, W)``, or None for an opaque image.
        icc_profile: color profile, if it is one for RGB.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None
    icc_profile: bytes | None


def decode_rgb(
    data: bytes, name: str, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = _KNOWN_FORMATS
) -> np.ndarray:
    """Decode an image file to ``uint8 (H, W, 3)`` RGB.

    EXIF orientation is applied; palette, gray and CMYK are converted to RGB; deeper samples are converted by the rules
    above; transparency is composited on white; of an animation, the first frame is used.

    Args:
        data: the file.
        name: named in error messages.
        max_pixels: limit on width times height, checked before decoding.
        formats: Pillow's names of the formats that are decoded. Name others only for files whose digest is known.

    Raises:
        UnusableImage: not an image, damaged, more than ``max_pixels``, or of samples whose range is not known.
    """
    try:
        return np.asarray(_to_rgb(*_opened(data, name, max_pixels, formats), name))
    except UnusableImage:
        raise
    except Exception as error:  # damaged bytes make decoders raise any exception
        raise _unreadable(name, error) from error


def decode_picture(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode an image file to pixels, transparency and color profile.

    Raises:
        UnusableImage: as `decode_rgb`.
    """
    try:
        image, deep = _opened(data, name, max_pixels)
        profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA", "P") else None
        profile = profile if isinstance(profile, bytes) else None
        if not _has_alpha(image):
            return Picture(np.asarray(_to_rgb(image, deep, name)), None, profile)
        pixels = np.asarray(image.convert("RGBA"))
        return Picture(pixels[..., :3], pixels[..., 3], profile)
    except UnusableImage:
        raise
    except Exception as error:  # as above
        raise _unreadable(name, error) from error


def image_size(data: bytes) -> tuple[int, int] | None:
    """Width and height as shown, from the header of the file; None if it cannot be read."""
    try:
        image = Image.open(io.BytesIO(data), formats=_KNOWN_FORMATS)
        width, height = image.size
        return (height, width) if _orientation(image) >= _ON_ITS_SIDE else (width, height)
    except Exception:  # noqa: BLE001  (as above)
        return None


@contextmanager
def picture_memory(data: bytes) -> Iterator[None]:
    """Wait until the other threads leave enough of `MAX_PICTURE_BYTES` for decoding and scoring this image file."""
    try:
        width, height = Image.open(io.BytesIO(data), formats=_KNOWN_FORMATS).size
    except Exception:  # noqa: BLE001  (it will be refused with its reason)
        width = height = 0
    with _MEMORY.reserve(width * height * BYTES_PER_PIXEL):
        yield


def read_rgb(path: Path) -> np.ndarray:
    """`decode_rgb` of a file.

    Raises:
        UnusableImage: the file cannot be read or decoded.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(str(path), error) from error
    return decode_rgb(data, str(path))


def plain_reason(error: BaseException) -> str:
    """Why an image could not be read, in words that do not change from run to run."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "decoding takes too much memory"
    first = (str(error).splitlines() or [""])[0]
    text = re.sub(r"<[^<>]*>| at 0x[0-9a-fA-F]+|0x[0-9a-fA-F]{6,}", "", first).strip(" :")
    return text or type(error).__name__


def _unreadable(name: str, error: BaseException) -> UnusableImage:
    if isinstance(error, Image.DecompressionBombError):
        return _too_large(name, f"more than {MAX_PIXELS // 1_000_000} megapixels")
    reason = plain_reason(error)
    return UnusableImage(NOT_READABLE, where=name, fix=f"repair or remove it ({reason})", reason=f"unreadable: {reason}")


def _too_large(name: str, size: str) -> UnusableImage:
    return UnusableImage(f"too large: {size}", where=name, fix="scale it down, or cut it into pieces")


def _unknown_range(name: str, samples: str) -> UnusableImage:
    return UnusableImage(
        f"unknown range of samples: {samples}", where=name, fix="save it with 8 or 16 bits per channel over the full range"
    )


def _opened(data: bytes, name: str, max_pixels: int, formats: tuple[str, ...] = _KNOWN_FORMATS) -> tuple[Image.Image, bool]:
    """The decoded image, upright, and whether it is a color image that is stored with 16 bits per channel."""
    image: Image.Image = Image.open(io.BytesIO(data), formats=formats)
    if image.width * image.height > max_pixels:
        raise _too_large(name, f"{image.width}x{image.height}")
    deep = ";16" in str(getattr(image, "tile", ""))  # the layout that Pillow decodes from, such as RGB;16B
    image.load()
    turn = _TURNS.get(_orientation(image))
    return (image if turn is None else image.transpose(turn)), deep


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8. Damaged EXIF data, or a value that does not exist, counts as 1 (upright)."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  (TypeError, struct.error and others)
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _has_alpha(image: Image.Image) -> bool:
    deep = image.mode.startswith("I") or image.mode == "F"
    return not deep and ("A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info)


def _to_rgb(image: Image.Image, deep: bool, name: str) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray(_levels_of_integers(np.asarray(image).astype(np.int64), name)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(_levels_of_floats(np.asarray(image), name)).convert("RGB")
    if deep and 0 < int(np.asarray(image)[..., :3].max()) < 16:
        raise _unknown_range(name, "16 bits of which the upper 4 are not used")
    if _has_alpha(image):
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy


def _levels_of_integers(values: np.ndarray, name: str) -> np.ndarray:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65_535:
        raise _unknown_range(name, f"integers from {low} to {high}")
    if 0 < high < 256:
        raise _unknown_range(name, f"16 bits of which only values to {high} are used")
    return (values >> (4 if high < 4096 else 8)).astype(np.uint8)


def _levels_of_floats(values: np.ndarray, name: str) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise _unknown_range(name, "floats that are not finite")
    if low < 0 or 1 < high < 16 or 255 < high < 4096 or high > 65_535:
        raise _unknown_range(name, f"floats from {low:g} to {high:g}")
    factor = 255.0 if high <= 1 else 1.0 if high <= 255 else 1 / 257
    return np.rint(values.astype(np.float64) * factor).astype(np.uint8)
