"""Squared error of bicubic reduction and enlargement over a photo, in NumPy. The patches stage uses it to score windows.

The arithmetic is that of ``ddsr_core.imaging.bicubic``, up to rounding, on one gray image. Each resampling is a product
with a banded Toeplitz matrix. Cut into blocks of `LR_BLOCK`, it becomes small dense products that stay in the processor's
cache.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cache

import cv2
import numpy as np

from ddsr_core.imaging.kernel import SCALE, Kernel

#: LR rows or columns per matrix product. Larger blocks multiply more zeros; smaller ones need more calls.
LR_BLOCK = 8
#: LR pixels outside an image that the kernel reaches: half of 4 taps.
LR_MARGIN_PX = 2
_buffers = threading.local()


def strip_px(scale: int) -> int:
    """HR rows of one block."""
    return scale * LR_BLOCK


def hr_margin_px(scale: int) -> int:
    """HR pixels outside an image that the kernel reaches: half of ``4 * scale`` taps, minus the half step.

    >>> hr_margin_px(4), hr_margin_px(3), hr_margin_px(2)
    (6, 5, 3)
    """
    return (3 * scale + 1) // 2


def squared_error_sums(image: np.ndarray, kernel: Kernel, cell_px: int, scale: int = SCALE) -> np.ndarray:
    """Sums of the squared round-trip error of the luma over a grid of square cells.

    Args:
        image: ``uint8 (H, W, 3)``, H and W multiples of ``scale``.
        kernel: of both resamplings.
        cell_px: side of a cell; a divisor of ``strip_px(scale)``.
        scale: factor of both resamplings.

    Returns:
        ``float64 (H // cell_px, W // cell_px)``, for pixels in [0, 1]. Incomplete cells on the right and at the bottom
        are left out.
    """
    height, width = image.shape[:2]
    luma, margin = _padded_luma(image, kernel, scale), hr_margin_px(scale)
    up = _matrices(kernel, scale)[1]
    wide = _widen(_down(luma, kernel, scale), up, scale)
    columns = np.arange(0, width // cell_px * cell_px, cell_px)
    scratch = np.empty((strip_px(scale), width), np.float32)
    sums = []
    for start, count in _blocks(height // scale):
        near = wide[start : start + count + 2 * LR_MARGIN_PX]
        error = np.matmul(_part(up, count * scale, len(near)), near, out=scratch[: count * scale])
        top = margin + start * scale
        error -= luma[top : top + len(error), margin : margin + width]
        cells = error[: len(error) // cell_px * cell_px].reshape(-1, cell_px, width)
        strip = np.einsum("krc,krc->kc", cells, cells)
        sums.append(np.add.reduceat(strip[:, : len(columns) * cell_px], columns, axis=1, dtype=np.float64))
    return np.concatenate(sums) / 255**2


def _buffer(name: str, rows: int, columns: int) -> np.ndarray:
    """An array that a thread reuses for the next photo. Memory fresh from the system would cost a tenth of the time."""
    buffer: np.ndarray | None = getattr(_buffers, name, None)
    if buffer is None or buffer.size < rows * columns:
        buffer = np.empty(rows * columns, np.float32)
        setattr(_buffers, name, buffer)
    return buffer[: rows * columns].reshape(rows, columns)


def _padded_luma(image: np.ndarray, kernel: Kernel, scale: int) -> np.ndarray:
    """Luma in [0, 255], ``float32``, with the margins that the kernel reaches outside the image."""
    (height, width), margin, rows = image.shape[:2], hr_margin_px(scale), strip_px(scale)
    luma = _buffer("luma", height + 2 * margin, width + 2 * margin)
    inside = luma[margin:-margin, margin:-margin]
    weights = np.array([[0.299, 0.587, 0.114]], np.float32)
    for start in range(0, height, rows):
        inside[start : start + rows] = cv2.transform(image[start : start + rows].astype(np.float32), weights)
    _fill_margins(luma, margin, kernel)
    return luma


def _down(luma: np.ndarray, kernel: Kernel, scale: int) -> np.ndarray:
    """Reduce an image with margins to the LR image with margins, ``(H/scale + 4, W/scale + 4)``."""
    down, margin = _matrices(kernel, scale)[0], hr_margin_px(scale)
    height, width = ((side - 2 * margin) // scale for side in luma.shape)
    short = _buffer("short", height, luma.shape[1])
    for start, count in _blocks(height):
        near = luma[start * scale : (start + count) * scale + 2 * margin]
        np.matmul(_part(down, count, len(near)), near, out=short[start : start + count])
    low = np.empty((height + 2 * LR_MARGIN_PX, width + 2 * LR_MARGIN_PX), np.float32)
    inside = low[LR_MARGIN_PX:-LR_MARGIN_PX, LR_MARGIN_PX:-LR_MARGIN_PX]
    for start, count in _blocks(width):
        near = short[:, start * scale : (start + count) * scale + 2 * margin]
        np.matmul(near, _part(down, count, near.shape[1]).T, out=inside[:, start : start + count])
    _fill_margins(low, LR_MARGIN_PX, kernel)
    return low


def _widen(low: np.ndarray, up: np.ndarray, scale: int) -> np.ndarray:
    """Enlarge ``(h + 4, w + 4)`` along its rows to ``(h + 4, scale * w)``."""
    width = low.shape[1] - 2 * LR_MARGIN_PX
    wide = _buffer("wide", len(low), width * scale)
    for start, count in _blocks(width):
        near = low[:, start : start + count + 2 * LR_MARGIN_PX]
        np.matmul(near, _part(up, count * scale, near.shape[1]).T, out=wide[:, start * scale : (start + count) * scale])
    return wide


def _blocks(side: int) -> Iterator[tuple[int, int]]:
    """First LR row and number of LR rows of each block."""
    for start in range(0, side, LR_BLOCK):
        yield start, min(LR_BLOCK, side - start)


def _part(matrix: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The matrix of a smaller block, which is a corner of the Toeplitz matrix."""
    return matrix[:rows, :columns]


@cache
def _matrices(kernel: Kernel, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """The float32 matrices of one block with its margins: reduction ``(8, 44)`` and enlargement ``(32, 12)`` at x4."""
    hr = np.arange(-hr_margin_px(scale), strip_px(scale) + hr_margin_px(scale))
    lr = np.arange(-LR_MARGIN_PX, LR_BLOCK + LR_MARGIN_PX)
    centers = scale * np.arange(LR_BLOCK) + (scale - 1) / 2
    distance = hr[None] - centers[:, None]
    down = _cubic(distance / scale, -0.5) / scale if kernel == "matlab" else _cubic(distance, -0.75)
    places = (np.arange(strip_px(scale)) - (scale - 1) / 2) / scale
    up = _cubic(lr[None] - places[:, None], -0.5 if kernel == "matlab" else -0.75)
    return down.astype(np.float32), up.astype(np.float32)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Cubic convolution kernel of Keys (1981), support [-2, 2]."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _fill_margins(padded: np.ndarray, margin: int, kernel: Kernel) -> None:
    """Fill the outermost ``margin`` rows and columns by mirroring (matlab) or repeating the border (opencv)."""
    for view in (padded, padded[::-1], padded.T, padded.T[::-1]):
        view[:margin] = view[margin : 2 * margin][::-1] if kernel == "matlab" else view[margin]
