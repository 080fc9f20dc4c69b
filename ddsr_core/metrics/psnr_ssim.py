"""PSNR and SSIM on Y and RGB, as the SR literature reports them. The values equal those of BasicSR's functions.

The SR image is clamped and rounded to 8 bits, and ``crop_border`` pixels (normally the scale) are cut off each edge. Y is
that of MATLAB's ``rgb2ycbcr`` on floats (BT.601, 16 to 235, not rounded). SSIM is that of Wang et al. (2004) with an 11x11
Gaussian window of sigma 1.5 on the valid region; SSIM on RGB is the mean over channels.

On 8-bit images, MATLAB's ``rgb2ycbcr`` rounds Y to integers, and so did the scripts behind many published tables;
``round_y`` does the same. Rounding moves PSNR by less than 0.02 dB and lowers SSIM by about 0.001: bicubic x4 on B100 has
0.6682 by BasicSR's functions, 0.6674 with Y rounded, and 0.6675 in print. (For the bicubic rows that papers copy from each
other, Y alone was enlarged, and rounded before and after.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddsr_core.errors import InputError

#: BT.601 luma of R, G, B in 0..255, giving 16..235 (MATLAB rgb2ycbcr).
Y_WEIGHTS = (65.481 / 255, 128.553 / 255, 24.966 / 255)
Y_OFFSET = 16.0
SSIM_WINDOW = 11
_SIGMA = 1.5
#: SSIM is computed in strips of about this many pixels, which stay in a CPU's cache: twice as fast.
_STRIP_PX = 1 << 16
_C1 = (0.01 * 255) ** 2
_C2 = (0.03 * 255) ** 2


class Fidelity(NamedTuple):
    """Pixel metrics of a batch, float64 (B,). PSNR in dB, ``inf`` for equal images; SSIM in [-1, 1]."""

    psnr_y: Tensor
    ssim_y: Tensor
    psnr_rgb: Tensor
    ssim_rgb: Tensor


@contextmanager
def full_precision() -> Iterator[None]:
    """Turn TF32 off on GPUs: its 10-bit mantissa changes the third digit of PSNR and SSIM."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def to_levels(image: Tensor) -> Tensor:
    """The levels that an 8-bit file would hold: floats in [0, 1] are clamped and rounded to 0, 1, … 255.

    Returns:
        float32 tensor of the same shape.
    """
    if image.dtype == torch.uint8:
        return image.float()
    return (image.float().clamp(0, 1) * 255).round()


def rgb_to_y(levels: Tensor) -> Tensor:
    """Luma of ``levels`` (B, 3, H, W) in 0..255: (B, 1, H, W) in 16..235, not rounded (BT.601)."""
    return torch.einsum("bchw,c->bhw", levels, levels.new_tensor(Y_WEIGHTS)).unsqueeze(1) + Y_OFFSET


def fidelity(sr: Tensor, hr: Tensor, *, crop_border: int, round_y: bool = False) -> Fidelity:
    """PSNR and SSIM on Y and on RGB in one pass.

    Args:
        sr: (B, 3, H, W), float in [0, 1] (clamped and rounded to 8 bits first) or uint8.
        hr: same shape, float in [0, 1] or uint8.
        crop_border: pixels cut off each edge before anything is measured; by convention the scale.
        round_y: round Y to integers, as MATLAB does with 8-bit images and BasicSR does not.

    Raises:
        InputError: the shapes differ or are not (B, 3, H, W), or the border leaves less than the SSIM window (11x11).

    Example:
        >>> import torch
        >>> hr = torch.full((1, 3, 24, 24), 100, dtype=torch.uint8)
        >>> gray_error = fidelity(hr + 5, hr, crop_border=4)  # on Y, the error is 219/255 of that on RGB
        >>> round(gray_error.psnr_rgb.item(), 2), round(gray_error.psnr_y.item(), 2)
        (34.15, 35.47)
    """
    sr, hr = _prepare(sr, hr, crop_border)
    difference = (sr - hr).double()
    with full_precision():
        y_sr, y_hr = (rgb_to_y(image).round() if round_y else rgb_to_y(image) for image in (sr, hr))
        similarity = _ssim(torch.cat([y_sr, sr], 1), torch.cat([y_hr, hr], 1))  # (B, 4): Y, R, G, B
    return Fidelity(
        psnr_y=_to_db((y_sr - y_hr).double().square().mean((1, 2, 3))),
        ssim_y=similarity[:, 0],
        psnr_rgb=_to_db(difference.square().mean((1, 2, 3))),
        ssim_rgb=similarity[:, 1:].mean(1),
    )


def luma_fidelity(sr_y: Tensor, hr_y: Tensor, *, crop_border: int) -> tuple[Tensor, Tensor]:
    """PSNR and SSIM of images that have Y alone.

    Args:
        sr_y: (B, 1, H, W) in 0..255, rounded as wanted.
        hr_y: same shape.
        crop_border: pixels cut off each edge before anything is measured.

    Returns:
        PSNR in dB and SSIM, float64 (B,) each.
    """
    inside = (..., slice(crop_border, sr_y.shape[-2] - crop_border), slice(crop_border, sr_y.shape[-1] - crop_border))
    sr_y, hr_y = sr_y[inside].float(), hr_y[inside].float()
    with full_precision():
        return _to_db((sr_y - hr_y).double().square().mean((1, 2, 3))), _ssim(sr_y, hr_y)[:, 0]


def mean_psnr(values: Iterable[float]) -> float | None:
    """Mean of the finite values, in dB; None if there are none.

    An SR image that equals its HR image has infinite PSNR. One such image (a black frame, for example) would make the
    mean of a test set infinite, so it is left out; `ddsr_core.evaluation.evaluate` counts it as ``identical``.

    Example:
        >>> mean_psnr([20.0, 30.0, float("inf")])
        25.0
    """
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None


def _prepare(sr: Tensor, hr: Tensor, crop_border: int) -> tuple[Tensor, Tensor]:
    if sr.shape != hr.shape or sr.ndim != 4 or sr.shape[1] != 3:
        raise InputError(
            f"cannot compare images of shape {tuple(sr.shape)} and {tuple(hr.shape)}",
            fix="pass two tensors of the same shape (B, 3, H, W)",
        )
    height, width = sr.shape[-2:]
    if min(height, width) - 2 * crop_border < SSIM_WINDOW:
        raise InputError(
            f"{height}x{width} px is too small to measure: SSIM needs {SSIM_WINDOW} px inside the border",
            fix=f"use images of at least {SSIM_WINDOW + 2 * crop_border} px per side",
        )
    inside = (..., slice(crop_border, height - crop_border), slice(crop_border, width - crop_border))
    return to_levels(sr)[inside], to_levels(hr)[inside]


def _to_db(mse: Tensor) -> Tensor:
    return 10 * torch.log10(255.0**2 / mse)


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    """Mean SSIM of each channel: levels (B, C, H, W) twice -> float64 (B, C)."""
    rows, columns = (side - SSIM_WINDOW + 1 for side in x.shape[-2:])
    strip = max(1, _STRIP_PX // x.shape[-1])
    spans = [slice(top, min(top + strip, rows) + SSIM_WINDOW - 1) for top in range(0, rows, strip)]
    sums = [_ssim_map(x[:, :, span], y[:, :, span]).double().sum((2, 3)) for span in spans]
    return torch.stack(sums).sum(0) / (rows * columns)


def _ssim_map(x: Tensor, y: Tensor) -> Tensor:
    """SSIM under each window: levels (B, C, H, W) twice -> (B, C, H - 10, W - 10). Wang et al. 2004, equation 13.

    The index needs mu_x mu_y, mu_x^2 + mu_y^2 and the same two terms of the variances. All four follow from the first two
    moments of x + y and x - y, so that four planes per channel are filtered instead of five.
    """
    mean_total, var_total = _moments(x + y - 255)  # centered: float32 squares of 0..510 would lose digits
    mean_delta, var_delta = _moments(x - y)
    # in place from here: on a CPU, allocating memory costs more than the arithmetic
    mean_total_sq = mean_total.add_(255).square_()
    mean_delta_sq = mean_delta.square_()
    luminance = (mean_total_sq - mean_delta_sq).add_(2 * _C1)
    luminance.div_(mean_total_sq.add_(mean_delta_sq).add_(2 * _C1))
    structure = (var_total - var_delta).add_(2 * _C2)
    structure.div_(var_total.add_(var_delta).add_(2 * _C2))
    return luminance.mul_(structure)


def _moments(planes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance under the SSIM window, valid region, of each channel: (B, C, H, W) -> two (B, C, H - 10, W - 10)."""
    means, squares = _gaussian_means(torch.cat([planes, planes.square()], 1)).chunk(2, 1)
    return means, squares.sub_(means.square())


def _gaussian_means(planes: Tensor) -> Tensor:
    """Means under the SSIM window, valid region: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    offsets = torch.arange(SSIM_WINDOW, device=planes.device, dtype=torch.float32) - SSIM_WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    window /= window.sum()
    channels = planes.shape[1]
    planes = planes.contiguous(memory_format=torch.channels_last)  # depthwise kernels: twice as fast on a CPU
    planes = F.conv2d(planes, window.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    means = F.conv2d(planes, window.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return means.contiguous()
