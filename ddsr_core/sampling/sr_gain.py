"""SR gain: how much of an image's detail follows from its LR, measured by a small SR network.

The gain of an image is the PSNR of the network's enlargement minus that of bicubic, dB. Edges and regular structure have
a high gain (real textured patches of BSDS500: 1.0 dB, one in ten above 2 dB). Noise has none, whatever its PSNR_bic.
This is our own addition: the paper controls only the amount of texture. The network is trained on the accepted patches of
the same photos, from scratch; no pretrained model takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ddsr_core.config import Runtime
from ddsr_core.imaging.bicubic import crop_to_multiple, make_lr, upsample
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.images import to_float
from ddsr_core.imaging.kernel import SCALE
from ddsr_core.metrics.psnr_ssim import rgb_to_y, to_levels
from ddsr_core.sr.weights import load_network

#: Images per forward pass.
BATCH = 32
#: Border that is left out, as in the metrics: near the border, the network lacks context.
BORDER_PX = 4
#: Limit of PSNR: a flat image is enlarged without error, and has no gain.
PERFECT_DB = 99.0


@torch.no_grad()
def sr_gains(network: nn.Module, images: Tensor, scale: int = SCALE) -> np.ndarray:
    """PSNR of the network's enlargements minus that of bicubic, on Y, dB.

    Args:
        network: ``(B, 3, h, w)`` in [0, 1] to ``scale`` times the size, on the images' device.
        images: float32 ``(B, 3, H, W)`` in [0, 1], cropped at the bottom and right to multiples of ``scale``.

    Returns:
        float32 ``(B,)``.
    """
    images = crop_to_multiple(images, scale)
    lr = make_lr(images, scale)
    return np.asarray((_psnr_y(network(lr), images) - _psnr_y(upsample(lr, scale), images)).cpu(), np.float32)


def _psnr_y(sr: Tensor, hr: Tensor) -> Tensor:
    """As in `metrics.psnr_ssim`, without SSIM and its smallest size; at most `PERFECT_DB`. ``(B,)``."""
    inside = (..., slice(BORDER_PX, -BORDER_PX), slice(BORDER_PX, -BORDER_PX))
    error = rgb_to_y(to_levels(sr)[inside]) - rgb_to_y(to_levels(hr)[inside])
    return -10 * (error.double().square().mean((1, 2, 3)) / 255**2).clamp_min(10 ** (-PERFECT_DB / 10)).log10()


def gains_of_files(teacher: Path, paths: Sequence[Path], runtime: Runtime) -> np.ndarray:
    """`sr_gains` of image files of one size, by the network of a train_sr artifact; ``(len(paths),)``.

    Raises:
        InputError: ``teacher`` holds no network.
    """
    loaded = load_network(teacher, trust=True)
    network = loaded.module.to(runtime.device)
    gains = []
    with runtime.progress("Measuring the SR gain of the samples", total=len(paths), unit="images") as bar:
        for start in range(0, len(paths), BATCH):
            batch = paths[start : start + BATCH]
            images = to_float(np.stack([read_rgb(path) for path in batch])).to(runtime.device)
            gains.append(sr_gains(network, images, loaded.scale))
            bar.advance(len(batch))
    return np.concatenate(gains)


def highest_gain(gains: np.ndarray, share: float, at_least: int) -> np.ndarray:
    """Indices, ascending, of the ``share`` of images with the highest gain, but no fewer than ``at_least``."""
    count = min(len(gains), max(at_least, round(share * len(gains))))
    return np.sort(np.argsort(-gains, kind="stable")[:count])
