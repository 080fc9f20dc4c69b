"""SR gain: how much of an image's detail can be told from its LR, measured by a small SR network.

The gain of an image is the PSNR of the network's enlargement less that of bicubic, dB. Edges and regular structure have
much of it (real textured patches of BSDS500: 1.0 dB, one in ten above 2 dB), noise that is only added has none, whatever
its PSNR_bic. Our own addition: the paper controls the amount of texture alone. The network is trained on the accepted
patches of the same photos, from nothing: no model from elsewhere comes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddsr_core.config import Runtime

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH = 32
#: As the metrics leave out: near the border the network guesses.
BORDER_PX = 4
#: A flat image is enlarged without any error: infinite PSNR, and no gain.
PERFECT_DB = 99.0


def sr_gains(network: nn.Module, images: Tensor) -> np.ndarray:
    """PSNR of the network's enlargements less that of bicubic, on Y, dB.

    Args:
        network: ``(B, 3, h, w)`` in [0, 1] to four times the size, on the images' device.
        images: float32 ``(B, 3, H, W)`` in [0, 1], H and W multiples of 4.

    Returns:
        float32 ``(B,)``.
    """
    import torch

    from ddsr_core.imaging.bicubic import make_lr, upsample

    with torch.no_grad():
        lr = make_lr(images)
        return np.asarray((_psnr_y(network(lr), images) - _psnr_y(upsample(lr), images)).cpu(), np.float32)


def _psnr_y(sr: Tensor, hr: Tensor) -> Tensor:
    """As `metrics.fidelity` has it, without SSIM and its smallest size; at most `PERFECT_DB`. ``(B,)``."""
    from ddsr_core.metrics.psnr_ssim import rgb_to_y, to_levels

    inside = (..., slice(BORDER_PX, -BORDER_PX), slice(BORDER_PX, -BORDER_PX))
    error = rgb_to_y(to_levels(sr)[inside]) - rgb_to_y(to_levels(hr)[inside])
    return -10 * (error.double().square().mean((1, 2, 3)) / 255**2).clamp_min(10 ** (-PERFECT_DB / 10)).log10()


def gains_of_files(teacher: Path, paths: Sequence[Path], runtime: Runtime) -> np.ndarray:
    """`sr_gains` of image files of one size, by the network of a train_sr artifact; ``(len(paths),)``.

    Raises:
        InputError: no network there.
    """
    from ddsr_core.imaging.decode import read_rgb
    from ddsr_core.imaging.images import to_float
    from ddsr_core.sr.weights import load_network

    network = load_network(teacher).module.to(runtime.device)
    gains = []
    with runtime.progress("SR gain of the samples", total=len(paths), unit="images") as bar:
        for start in range(0, len(paths), BATCH):
            batch = paths[start : start + BATCH]
            images = to_float(np.stack([read_rgb(path) for path in batch])).to(runtime.device)
            gains.append(sr_gains(network, images))
            bar.advance(len(batch))
    return np.concatenate(gains)


def most_learnable(gains: np.ndarray, share: float, at_least: int) -> np.ndarray:
    """Indices, ascending, of the ``share`` of images with the highest gain, but no fewer than ``at_least``."""
    count = min(len(gains), max(at_least, round(share * len(gains))))
    return np.sort(np.argsort(-gains, kind="stable")[:count])
