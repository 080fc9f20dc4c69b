"""RRDBNet from basicsr: the generator of ESRGAN, Real-ESRGAN and RealSR.

Wang et al., "ESRGAN: Enhanced Super-Resolution Generative Adversarial Networks", ECCVW 2018. The same weights are in
use under three sets of names: the first of ESRGAN (``model.1.sub.0.RDB1.conv1.0``), those of RealSR and
BSRGAN (``RRDB_trunk.0.RDB1.conv1``), and those of Real-ESRGAN, basicsr and this module (``body.0.rdb1.conv1``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddsr_core.sr.archs.srformer import reflect_to_multiple
from ddsr_core.sr.basicsr_compat import import_basicsr


class RRDBNet(import_basicsr("archs.rrdbnet_arch").RRDBNet):  # type: ignore[misc]
    """Super-resolution of RGB in [0, 1]: ``(B, 3, h, w)`` to ``(B, 3, 4h, 4w)``, not clamped.

    The last convolution runs in float32: bfloat16 cannot distinguish neighboring gray levels.

    Args:
        feat: channels of the trunk.
        blocks: residual-in-residual dense blocks.
        grow: channels that each convolution of a dense block adds. Other programs expect 32.
        scale: 4, or 2 as Real-ESRGAN's x2 model: the input is folded into channels, 2x2 pixels each.

    Raises:
        ValueError: another scale.
    """

    def __init__(self, feat: int = 64, blocks: int = 23, grow: int = 32, scale: int = 4) -> None:
        if scale not in (2, 4):
            raise ValueError(f"RRDBNet upscales by 2 or 4, not by {scale}")
        super().__init__(3, 3, scale=scale, num_feat=feat, num_block=blocks, num_grow_ch=grow)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if self.scale == 2:
            x = F.pixel_unshuffle(reflect_to_multiple(reflect_to_multiple(x, 2, 2), 3, 2), 2)
        return self.upscale(x)[..., : height * self.scale, : width * self.scale]

    def upscale(self, x: Tensor) -> Tensor:
        """The network on its folded input: ``(B, C, h, w)`` to ``(B, 3, 4h, 4w)``."""
        x = self.conv_first(x)
        x = x + self.conv_body(self.body(x))
        for conv in (self.conv_up1, self.conv_up2):
            x = self.lrelu(conv(F.interpolate(x, scale_factor=2, mode="nearest")))
        x = self.lrelu(self.conv_hr(x))
        with torch.autocast(x.device.type, enabled=False):
            return self.conv_last(x.to(self.conv_last.weight.dtype))


_OUTER = {
    "model.0": "conv_first", "model.3": "conv_up1", "model.6": "conv_up2", "model.8": "conv_hr", "model.10": "conv_last",
    "trunk_conv": "conv_body", "upconv1": "conv_up1", "upconv2": "conv_up2", "HRconv": "conv_hr",
}  # fmt: skip
_INNER = re.compile(r"(?:model\.1\.sub|RRDB_trunk)\.(\d+)\.RDB(\d)\.conv(\d)(?:\.0)?")
_AFTER_BODY = re.compile(r"model\.1\.sub\.\d+")


def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a generator's state dict to Real-ESRGAN's names. Any other state dict is returned unchanged."""
    first = "model.10.weight" in state and "model.1.sub.0.RDB1.conv1.0.weight" in state
    second = "HRconv.weight" in state and "RRDB_trunk.0.RDB1.conv1.weight" in state
    return {_own_name(name): value for name, value in state.items()} if first or second else dict(state)


def _own_name(name: str) -> str:
    place, _, kind = name.rpartition(".")
    if inner := _INNER.fullmatch(place):
        return "body.{}.rdb{}.conv{}.{}".format(*inner.groups(), kind)
    return f"{'conv_body' if _AFTER_BODY.fullmatch(place) else _OUTER.get(place, place)}.{kind}"


def rrdbnet_kwargs(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Arguments of the `RRDBNet` that a state dict (`own_names`) belongs to, or None if it belongs to another network.

    Generators for x1 (48 input channels) and ESRGAN+ are other networks.
    """
    needed = ("conv_first.weight", "body.0.rdb1.conv1.weight", "conv_body.weight", "conv_hr.weight", "conv_last.weight")
    if not all(name in state for name in needed) or any("conv1x1" in name for name in state):
        return None
    feat, channels = state["conv_first.weight"].shape[:2]
    if channels not in (3, 12):
        return None
    return {
        "feat": feat,
        "blocks": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("body.")),
        "grow": state["body.0.rdb1.conv1.weight"].shape[0],
        "scale": 4 if channels == 3 else 2,
    }
