"""Images as arrays and tensors, and as PNG files.

Pixels are ``uint8 (H, W, 3)`` RGB in files, ``float32 (B, 3, H, W)`` in [0, 1] for SR and in [-1, 1] for diffusion. All
conversions between them are in this module.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddsr_core.imaging.decode import MAX_PIXELS, decode_rgb, read_rgb
from ddsr_core.imaging.image_sets import (
    finish_image_set,
    image_schema,
    image_set_name,
    read_image_parquet,
    read_image_set,
    write_image_parquet,
)
from ddsr_core.imaging.photos import (
    IMAGE_SUFFIXES,
    UNREADABLE,
    Photo,
    find_images,
    iter_photos,
    photo_digests,
    photo_source,
)
from ddsr_core.storage.files import write_atomically

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "UNREADABLE",
    "Photo",
    "decode_rgb",
    "encode_png",
    "find_images",
    "finish_image_set",
    "from_signed",
    "image_schema",
    "image_set_name",
    "iter_photos",
    "photo_digests",
    "photo_source",
    "read_image_parquet",
    "read_image_set",
    "read_rgb",
    "save_png",
    "to_float",
    "to_signed",
    "to_uint8",
    "write_image_parquet",
]


def encode_png(image: np.ndarray, level: int = 6, icc_profile: bytes | None = None) -> bytes:
    """Encode ``uint8 (H, W, 3)``, or ``(H, W, 4)`` with alpha, as PNG. The same pixels always give the same bytes.

    Args:
        image: the pixels.
        level: effort of the compression, 0 to 9.
        icc_profile: color profile to store in the file.
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=level, icc_profile=icc_profile)
    return buffer.getvalue()


def save_png(path: Path, image: np.ndarray) -> None:
    """Write ``uint8 (H, W, 3)`` as PNG, atomically."""
    write_atomically(path, encode_png(image))


def to_float(image: np.ndarray, device: str | torch.device = "cpu") -> Tensor:
    """``uint8 (H, W, 3)`` or ``(B, H, W, 3)`` to ``float32 (B, 3, H, W)`` in [0, 1], on ``device``."""
    # Moved to the device as bytes, a quarter of the size.
    batch = torch.from_numpy(np.array(image if image.ndim == 4 else image[None])).to(device)
    return batch.permute(0, 3, 1, 2).float().div(255)


def to_uint8(x: Tensor) -> np.ndarray:
    """``float (B, 3, H, W)`` in [0, 1] (clamped, rounded) to ``uint8 (B, H, W, 3)``."""
    pixels = x.detach().float().mul(255).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_signed(x: Tensor) -> Tensor:
    """[0, 1] to [-1, 1]."""
    return x * 2 - 1


def from_signed(x: Tensor) -> Tensor:
    """[-1, 1] to [0, 1]."""
    return (x + 1) / 2
