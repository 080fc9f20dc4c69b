"""Training patches of `ddsr-tiny`: textured windows of a folder of photographs, at several scales.

The photographs of the published weights come from Debian's wallpaper packages (`scripts/fetch_wallpapers.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ddsr_core.errors import InputError
from ddsr_core.imaging.bicubic import downsample, upsample
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.photos import find_images
from ddsr_core.progress import ProgressFactory, silent


def window_psnr_bic(image: np.ndarray, window_px: int, stride_px: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """PSNR_bic in dB of every window of a photo (``uint8 (H, W, 3)``), from one resampling of the whole photo.

    Returns:
        ``(psnr (rows, columns), ys (rows,), xs (columns,))``.
    """
    height, width = (side - side % 4 for side in image.shape[:2])
    grey = np.asarray(Image.fromarray(image).convert("L"), np.float32)[:height, :width] / 255
    hr = torch.from_numpy(grey)[None, None]
    error = (hr - upsample(downsample(hr)))[0, 0].double().square().numpy()
    integral = np.pad(error.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    ys = np.arange(0, height - window_px + 1, stride_px)
    xs = np.arange(0, width - window_px + 1, stride_px)
    top, bottom = integral[ys], integral[ys + window_px]
    total = bottom[:, xs + window_px] - bottom[:, xs] - top[:, xs + window_px] + top[:, xs]
    return -10 * np.log10(total / window_px**2 + 1e-12), ys, xs


def scaled_copies(image: np.ndarray, short_sides_px: tuple[int, ...], least_reduction: float) -> Iterator[np.ndarray]:
    """The photo at each short side that makes it at least ``least_reduction`` times smaller (which removes JPEG marks)."""
    height, width = image.shape[:2]
    for short_side in short_sides_px:
        factor = min(height, width) / short_side
        if factor >= least_reduction:
            size = (round(width / factor), round(height / factor))
            yield np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def textured_patches(
    folder: Path,
    *,
    window_px: int,
    stride_px: int,
    below_db: float,
    short_sides_px: tuple[int, ...],
    least_reduction: float,
    most: int,
    seed: int,
    progress: ProgressFactory = silent,
) -> np.ndarray:
    """Every window of every photo and scale with PSNR_bic below ``below_db``, at most ``most`` of them drawn by ``seed``.

    Returns:
        ``uint8 (N, window_px, window_px, 3)``.

    Raises:
        InputError: no photo has such a window.
    """
    photos = find_images(folder)
    kept: list[np.ndarray] = []
    with progress("Cutting patches", total=len(photos), unit="photos") as bar:
        for path in photos:
            for image in scaled_copies(read_rgb(path), short_sides_px, least_reduction):
                psnr, ys, xs = window_psnr_bic(image, window_px, stride_px)
                for row, column in zip(*np.nonzero(psnr < below_db), strict=True):
                    y, x = ys[row], xs[column]
                    kept.append(image[y : y + window_px, x : x + window_px].copy())
            bar.advance()
    if not kept:
        raise InputError(
            f"no window of {len(photos)} photos has a PSNR_bic below {below_db} dB",
            where=folder,
            fix="bring larger or more textured photos, or raise pretrain.below_db",
        )
    chosen = np.random.default_rng(seed).permutation(len(kept))[:most]
    return np.stack([kept[index] for index in chosen])
