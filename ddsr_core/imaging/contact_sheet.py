"""Contact sheets: many images arranged on one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

GAP_PX = 2


def contact_sheet(images: Sequence[np.ndarray], columns: int, px: int) -> np.ndarray:
    """Arrange images in rows on white, each cropped to its center square and scaled to ``px``.

    Args:
        images: at least one, ``uint8 (H, W, 3)``, of any size.
        columns: images per row; the sheet is no wider than its images.
        px: height and width of each image on the sheet, in pixels.

    Returns:
        ``uint8 (rows * (px + GAP_PX) - GAP_PX, columns * (px + GAP_PX) - GAP_PX, 3)``.

    Raises:
        ValueError: no images.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one image")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    pitch = px + GAP_PX
    sheet = np.full((rows * pitch - GAP_PX, columns * pitch - GAP_PX, 3), 255, np.uint8)
    for index, image in enumerate(images):
        y, x = index // columns * pitch, index % columns * pitch
        sheet[y : y + px, x : x + px] = _square(image, px)
    return sheet


def _square(image: np.ndarray, px: int) -> np.ndarray:
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(Image.fromarray(image).resize((px, px), Image.Resampling.BICUBIC, box=box))
