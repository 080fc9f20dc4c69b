"""Bicubic resampling with the two kernels that the literature confuses, and PSNR_bic (paper, equation 1).

``matlab``: antialiased, a = -0.5, symmetric borders, as MATLAB's ``imresize`` and the LR images of SR benchmarks.
``opencv``: not antialiased, a = -0.75, replicated borders, as the authors' code that scores patches. Its PSNR_bic is 1.0
to 1.8 dB lower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ddsr_core.imaging.kernel import SCALE, Kernel

#: LR pixels inside a crop whose value depends on pixels outside it (the kernel's support is 4 LR pixels).
LR_MARGIN_PX = 2


def downsample(x: Tensor, scale: int = SCALE, kernel: Kernel = "matlab") -> Tensor:
    """Reduce ``float (B, C, H, W)``, of any range, to ``(B, C, H/scale, W/scale)``, without rounding or clamping.

    Differentiable.

    Raises:
        ValueError: a side is not a multiple of ``scale``.
    """
    height, width = x.shape[-2:]
    if height % scale or width % scale:
        raise ValueError(f"sides {height}x{width} are not multiples of {scale}")
    size = (height // scale, width // scale)
    if kernel == "opencv":
        return F.interpolate(x, size=size, mode="bicubic", align_corners=False)
    margin = 2 * scale  # half the kernel's support
    padded = symmetric_pad(x, margin)
    reduced = F.interpolate(padded, size=(size[0] + 4, size[1] + 4), mode="bicubic", align_corners=False, antialias=True)
    return reduced[..., 2:-2, 2:-2]


def upsample(x: Tensor, scale: int = SCALE, kernel: Kernel = "matlab") -> Tensor:
    """Enlarge ``float (B, C, h, w)``, of any range, to ``(B, C, h * scale, w * scale)``, without rounding or clamping.

    Differentiable.
    """
    size = (x.shape[-2] * scale, x.shape[-1] * scale)
    if kernel == "opencv":
        return F.interpolate(x, size=size, mode="bicubic", align_corners=False)
    padded = symmetric_pad(x, 2)
    enlarged = F.interpolate(
        padded,
        size=(size[0] + 4 * scale, size[1] + 4 * scale),
        mode="bicubic",
        align_corners=False,
        antialias=True,
    )
    margin = 2 * scale
    return enlarged[..., margin:-margin, margin:-margin]


def symmetric_pad(x: Tensor, margin: int) -> Tensor:
    """Mirror ``(B, C, H, W)`` at its borders and repeat the border pixel (NumPy's ``symmetric``)."""
    rows = _mirrored(x.shape[-2], margin, x.device)
    columns = _mirrored(x.shape[-1], margin, x.device)
    return x.index_select(-2, rows).index_select(-1, columns)


def _mirrored(size: int, margin: int, device: torch.device) -> Tensor:
    index = torch.arange(-margin, size + margin, device=device) % (2 * size)
    return torch.where(index < size, index, 2 * size - 1 - index)


def crop_to_multiple(x: Tensor, scale: int) -> Tensor:
    """Crop ``(B, C, H, W)`` at the bottom and right so that both sides are multiples of ``scale``."""
    height, width = (side - side % scale for side in x.shape[-2:])
    return x[..., :height, :width]


def make_lr(hr: Tensor, scale: int = SCALE) -> Tensor:
    """LR images as SR benchmarks define them: ``matlab`` kernel, rounded to 8 bits.

    Args:
        hr: ``float (B, C, H, W)`` in [0, 1].

    Returns:
        ``float (B, C, H/scale, W/scale)`` in [0, 1], every value a multiple of 1/255.
    """
    return downsample(hr, scale).mul(255).round().clamp(0, 255).div(255)


def gray(x: Tensor) -> Tensor:
    """Luma ``(B, 1, H, W)`` of RGB ``(B, 3, H, W)``, with the weights of Pillow's mode "L" (BT.601, full range)."""
    return (x * per_channel((0.299, 0.587, 0.114), x)).sum(1, keepdim=True)


def per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """Constants ``(1, len(values), 1, 1)`` for images like ``like``.

    They are filled in on the device: a copy from the host would wait for everything that a GPU still has to do.
    """
    return torch.cat([torch.full((1, 1, 1, 1), value, device=like.device, dtype=like.dtype) for value in values], dim=1)


def psnr_bic(x: Tensor, kernel: Kernel = "matlab", scale: int = SCALE) -> Tensor:
    """PSNR_bic (paper, equation 1): how well an image survives bicubic reduction and enlargement.

    Low values mean much texture. Differentiable.

    Args:
        x: ``float (B, 3, H, W)`` in [0, 1], cropped at the bottom and right to multiples of ``scale``.
        kernel: of both resamplings.
        scale: factor of both resamplings, 4 in the paper.

    Returns:
        ``(B,)`` in dB, at most 120.
    """
    luma = crop_to_multiple(gray(x), scale)
    error = (luma - upsample(downsample(luma, scale, kernel), scale, kernel)).square().mean((1, 2, 3))
    return -10 * torch.log10(error + 1e-12)
