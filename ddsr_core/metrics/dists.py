"""DISTS (Ding et al., Image Quality Assessment: Unifying Structure and Texture Similarity, TPAMI 2022), on VGG16.

The trunk is that of LPIPS (VGG16) with other poolings; the authors fitted 2 x 1475 weights. The weights come from the
package ``dists-pytorch``, or from a file of the same format in torch's cache, where the package ``piq`` keeps its own.
No other weights are accepted, because the result would not be DISTS.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddsr_core.errors import InputError, MissingWeightsError
from ddsr_core.metrics.lpips import load_trunk
from ddsr_core.metrics.psnr_ssim import full_precision, to_levels
from ddsr_core.metrics.trunks import FIX as TRUNK_FIX
from ddsr_core.storage.weights_file import readable

PACKAGE, FILE = "dists-pytorch", "weights.pt"
CACHED = "dists_weights.pt"
FIX = f"pip install --no-deps {PACKAGE}, or save its {FILE} as {CACHED}"
#: Channels of the compared features: the image itself, then the last ReLU of each of the five stages of VGG16.
CHANNELS = (3, 64, 128, 256, 512, 512)

#: Convolutions of each stage, by torchvision's index. An L2 pooling precedes each stage but the first.
_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Avoids 0 / 0 (c1 and c2 in the paper).
_STABILITY = 1e-6
_ROOT_EPS = 1e-12


class Dists:
    """DISTS: 0 for equal images, larger for less similar ones, rarely above 1.

    It is computed on the full image. The authors scale large images down to 256 px.

    Args:
        device: torch device of the trunk and of the images.
        weights: ``alpha`` (texture) and ``beta`` (structure), each (1, 1475, 1, 1); default: `load_weights`.
        trunk: the convolutions of VGG16, ``features.N.weight`` (OIHW) and ``features.N.bias``; default:
            `ddsr_core.metrics.lpips.load_trunk`.

    Raises:
        MissingWeightsError: weights or trunk are neither installed nor given.
        InputError: the weights file is damaged or has another format.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        weights: Mapping[str, Tensor] | None = None,
        trunk: Mapping[str, Tensor] | None = None,
    ) -> None:
        weights = load_weights() if weights is None else weights
        total = weights["alpha"].sum() + weights["beta"].sum()
        self._alpha, self._beta = (
            torch.split((weights[name].detach().float().flatten() / total).to(device), list(CHANNELS))
            for name in ("alpha", "beta")
        )
        self._trunk = _Trunk(load_trunk("vgg") if trunk is None else trunk, torch.device(device))

    @torch.inference_mode()
    def __call__(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Distance of each pair of images.

        Args:
            sr: (B, 3, H, W), float in [0, 1] (rounded to 8 bits first) or uint8.
            hr: same shape.

        Returns:
            float32 (B,).
        """
        with full_precision():
            similarity = torch.zeros(len(sr), device=sr.device)
            features = zip(self._trunk(to_levels(sr) / 255), self._trunk(to_levels(hr) / 255), strict=True)
            for (x, y), alpha, beta in zip(features, self._alpha, self._beta, strict=True):
                texture, structure = _similarities(x, y)
                similarity += texture @ alpha + structure @ beta
            return 1 - similarity


def load_weights() -> dict[str, Tensor]:
    """The authors' ``alpha`` and ``beta``, each (1, 1475, 1, 1), from ``dists-pytorch`` or else from torch's cache.

    Raises:
        MissingWeightsError: neither has them.
        InputError: the file is damaged or has another format.
    """
    path = _installed() or Path(torch.hub.get_dir()) / "checkpoints" / CACHED
    if not path.is_file():
        raise MissingWeightsError("the weights of DISTS are not installed", where=path, fix=FIX)
    return read_weights(path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """``alpha`` and ``beta`` of a file, read with ``weights_only``.

    Raises:
        InputError: the file is damaged or has another format.
    """
    with readable(path, fix=f"use the {FILE} of {PACKAGE}"):
        content = torch.load(path, map_location="cpu", weights_only=True)
    shape = (1, sum(CHANNELS), 1, 1)
    stored = {name: content.get(name) for name in ("alpha", "beta")} if isinstance(content, dict) else {}
    weights = {name: value for name, value in stored.items() if isinstance(value, Tensor) and value.shape == shape}
    if len(weights) < 2:
        raise InputError(
            f"not the weights of DISTS: alpha and beta of shape {shape} are expected",
            where=path,
            fix=f"use the {FILE} of {PACKAGE}",
        )
    return weights


def _installed() -> Path | None:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == FILE), None)


class _Trunk:
    """The image and five stages of VGG16, (B, C, h, w) each."""

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device) -> None:
        self._stages: list[nn.Module] = []
        for indices in _STAGES:
            layers = [layer for index in indices for layer in (_convolution(weights, index), nn.ReLU(inplace=True))]
            stage: nn.Module = nn.Sequential(*layers)
            self._stages.append(stage.to(device).to(memory_format=torch.channels_last))
        self._mean, self._std = (torch.tensor(v, device=device)[:, None, None] for v in (_MEAN, _STD))

    def __call__(self, image: Tensor) -> list[Tensor]:
        result = [image]
        x = ((image - self._mean) / self._std).contiguous(memory_format=torch.channels_last)
        for number, stage in enumerate(self._stages):
            x = stage(_l2_pool(x) if number else x)
            result.append(x)
        return result


def _convolution(weights: Mapping[str, Tensor], index: int) -> nn.Conv2d:
    try:
        weight, bias = (weights[f"features.{index}.{name}"] for name in ("weight", "bias"))
    except KeyError as error:
        raise MissingWeightsError("the VGG16 trunk for DISTS is incomplete", where=error, fix=TRUNK_FIX) from error
    with torch.device("meta"):  # no random initialization, which would advance the global generator
        convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
    convolution.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    convolution.requires_grad_(False)
    return convolution


def _l2_pool(x: Tensor) -> Tensor:
    """Square root of the Hann-weighted mean of squares, at half the size: max pooling without its aliasing."""
    taps = torch.tensor([0.25, 0.5, 0.25], device=x.device)
    window = torch.outer(taps, taps).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(x.square(), window, stride=2, padding=1, groups=x.shape[1]).add_(_ROOT_EPS).sqrt_()


def _similarities(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Texture (similarity of means) and structure (correlation) of each channel: (B, C, h, w) twice -> (B, C) twice.

    Equations 5 and 6 of the paper.
    """
    mean_x, mean_y = (v.mean((2, 3), keepdim=True) for v in (x, y))
    x, y = x - mean_x, y - mean_y
    variances = x.square().mean((2, 3)) + y.square().mean((2, 3))
    covariance = (x * y).mean((2, 3))
    squares = (mean_x.square() + mean_y.square()).flatten(1)
    texture = (2 * (mean_x * mean_y).flatten(1) + _STABILITY) / (squares + _STABILITY)
    return texture, (2 * covariance + _STABILITY) / (variances + _STABILITY)
