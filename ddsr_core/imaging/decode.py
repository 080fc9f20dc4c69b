"""Decoding image files of untrusted content to pixels: ``uint8 (H, W, 3)`` RGB."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ddsr_core.errors import InputError

#: Larger images are refused: 256 megapixels take 3 GiB as float32.
MAX_PIXELS = 256_000_000


def decode_rgb(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file to ``uint8 (H, W, 3)`` RGB.

    EXIF orientation is applied; palette, gray and CMYK are converted to RGB; 16-bit gray is scaled to 8 bits;
    transparency is composited on white; of an animation, the first frame is used.

    Args:
        data: the file.
        name: named in error messages.
        max_pixels: limit on width times height, checked before decoding.

    Raises:
        InputError: not an image, truncated, or more than ``max_pixels``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` is the limit
            image: Image.Image = Image.open(io.BytesIO(data))
            if image.width * image.height > max_pixels:
                raise InputError(f"too large: {image.width}x{image.height}", where=name, fix="scale it down")
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(_to_rgb(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError("not a readable image", where=name, fix=f"repair or remove it ({error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image  # convert would copy
    if image.mode.startswith("I;16") or image.mode == "I":
        wide = np.asarray(image).astype(np.int64)
        return Image.fromarray((wide >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(np.asarray(image).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def read_rgb(path: Path) -> np.ndarray:
    """`decode_rgb` of a file."""
    return decode_rgb(Path(path).read_bytes(), str(path))
