"""EDSR (Lim et al., "Enhanced Deep Residual Networks for Single Image Super-Resolution", CVPRW 2017) from basicsr.

State-dict names are those of basicsr. Two things differ from its class: the mean is a buffer, so that it moves with the
module to other devices, and the last convolution always runs in float32, because the network works in [0, 255], where
bfloat16 resolves whole gray levels only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddsr_core.sr.basicsr_compat import import_basicsr


class EDSR(import_basicsr("archs.edsr_arch").EDSR):  # type: ignore[misc]
    """Super-resolution of RGB in [0, 1]: ``(B, 3, h, w)`` to ``(B, 3, scale h, scale w)``, not clamped.

    Args:
        feat: channels of the trunk.
        blocks: residual blocks.
        res_scale: factor of each block's residual. 0.1 stabilizes the wide network.
        scale: upsampling factor.
    """

    def __init__(self, feat: int = 64, blocks: int = 16, res_scale: float = 1.0, scale: int = 4) -> None:
        super().__init__(3, 3, num_feat=feat, num_block=blocks, upscale=scale, res_scale=res_scale)
        mean = self.mean
        del self.mean  # a plain attribute in basicsr
        self.register_buffer("mean", mean, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) * self.img_range
        x = self.conv_first(x)
        x = x + self.conv_after_body(self.body(x))
        x = self.upsample(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.conv_last(x.to(self.conv_last.weight.dtype)) / self.img_range + self.mean


def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict from the names of EDSR-PyTorch, the authors' code, to basicsr's.

    The authors' ``sub_mean`` and ``add_mean`` are constants and dropped. A file without them, or with other values, belongs
    to a network with another input range; it and any other state dict are returned unchanged.
    """
    shift = mean_shift()
    if "head.0.weight" not in state or "body.0.body.2.weight" not in state or not all(name in state for name in shift):
        return dict(state)
    if not all(alike(state[name], value) for name, value in shift.items()):
        return dict(state)
    return {_own_name(name): value for name, value in state.items() if name not in shift}


def _own_name(name: str) -> str:
    match name.split("."):
        case ["head", "0", kind]:
            return f"conv_first.{kind}"
        case ["body", block, "body", layer, kind]:
            return f"body.{block}.conv{1 + int(layer) // 2}.{kind}"
        case ["body", _, kind]:
            return f"conv_after_body.{kind}"
        case ["tail", "0", layer, kind]:
            return f"upsample.{layer}.{kind}"
        case ["tail", "1", kind]:
            return f"conv_last.{kind}"
    return name


def mean_shift() -> dict[str, Tensor]:
    """The first and last layer of the authors of EDSR and RCAN: subtract and add the mean of DIV2K, in gray levels."""
    eye, mean = torch.eye(3).view(3, 3, 1, 1), 255 * torch.tensor([0.4488, 0.4371, 0.4040])
    return {"sub_mean.weight": eye, "sub_mean.bias": -mean, "add_mean.weight": eye.clone(), "add_mean.bias": mean}


def alike(given: Tensor, value: Tensor) -> bool:
    """Equal within half precision."""
    return given.shape == value.shape and torch.allclose(given.float(), value, rtol=4e-3, atol=1e-3)


def edsr_kwargs(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Arguments of the EDSR that a state dict belongs to, or None if it belongs to another network.

    ``res_scale`` cannot be seen in the weights: it is taken as 0.1 for 256 channels or more, the paper's large network.
    """
    needed = (
        "conv_first.weight",
        "body.0.conv1.weight",
        "conv_after_body.weight",
        "upsample.0.weight",
        "conv_last.weight",
    )
    if not all(name in state for name in needed) or "body.0.rdb1.conv1.weight" in state:
        return None
    feat = state["conv_first.weight"].shape[0]
    blocks = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("body."))
    stages = sum(name.startswith("upsample.") and name.endswith(".weight") for name in state)
    scale = 3 if state["upsample.0.weight"].shape[0] == 9 * feat else 2**stages
    return {"feat": feat, "blocks": blocks, "res_scale": 0.1 if feat >= 256 else 1.0, "scale": scale}
