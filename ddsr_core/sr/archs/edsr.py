"""EDSR (Lim et al., "Enhanced Deep Residual Networks for Single Image Super-Resolution", CVPRW 2017) from basicsr.

State-dict names are basicsr's. Two things differ from its class: the mean is a buffer, so that the module moves between
devices like any other, and the last convolution always runs in float32: the network works at a range of 255, where
bfloat16 counts in whole gray levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddsr_core.sr.basicsr_compat import import_basicsr


class EDSR(import_basicsr("archs.edsr_arch").EDSR):  # type: ignore[misc]
    """x4 super-resolution of RGB in [0, 1]: ``(B, 3, h, w)`` to ``(B, 3, scale h, scale w)``, not clamped.

    Args:
        feat: channels of the trunk.
        blocks: residual blocks.
        res_scale: factor on each block's residual; 0.1 steadies the wide network.
        scale: upsampling factor.
    """

    def __init__(self, feat: int = 64, blocks: int = 16, res_scale: float = 1.0, scale: int = 4) -> None:
        super().__init__(3, 3, num_feat=feat, num_block=blocks, upscale=scale, res_scale=res_scale)
        mean = self.mean
        del self.mean  # a plain attribute there
        self.register_buffer("mean", mean, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) * self.img_range
        x = self.conv_first(x)
        x = x + self.conv_after_body(self.body(x))
        x = self.upsample(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.conv_last(x.to(self.conv_last.weight.dtype)) / self.img_range + self.mean


def edsr_kwargs(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The arguments that a state dict was made with, or None if it is not an EDSR's.

    ``res_scale`` leaves no trace in the weights: 256 channels or more are taken for the paper's large network, 0.1.
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
