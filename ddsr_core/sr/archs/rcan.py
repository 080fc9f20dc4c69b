"""RCAN (Zhang et al., "Image Super-Resolution Using Very Deep Residual Channel Attention Networks", ECCV 2018) from basicsr.

The module uses basicsr's state-dict names. The authors' files, and upscaling tools that open them, use other names;
`own_names` and `public_names` translate. As in `edsr`, the mean is a buffer and the last convolution runs in float32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddsr_core.sr.archs.edsr import alike, mean_shift
from ddsr_core.sr.basicsr_compat import import_basicsr


class RCAN(import_basicsr("archs.rcan_arch").RCAN):  # type: ignore[misc]
    """Super-resolution of RGB in [0, 1]: ``(B, 3, h, w)`` to ``(B, 3, scale h, scale w)``, not clamped.

    Args:
        feat: channels of the trunk.
        groups: residual groups.
        blocks: residual channel attention blocks of each group.
        reduction: reduction factor of the channel attention's bottleneck.
        scale: upsampling factor.
    """

    def __init__(self, feat: int = 64, groups: int = 10, blocks: int = 20, reduction: int = 16, scale: int = 4) -> None:
        super().__init__(3, 3, num_feat=feat, num_group=groups, num_block=blocks, squeeze_factor=reduction, upscale=scale)
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
    """Rename a state dict from the authors' names to basicsr's. Any other state dict is returned unchanged.

    The authors' ``sub_mean`` and ``add_mean`` are constants and dropped. A file without them, or with other values, belongs
    to a network with another input range and is returned unchanged.
    """
    shift = mean_shift()
    if "head.0.weight" not in state or not all(name in state for name in shift):
        return dict(state)
    if not all(alike(state[name], value) for name, value in shift.items()):
        return dict(state)
    return {_own_name(name): value for name, value in state.items() if name not in shift}


def public_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an `RCAN`'s state dict to the authors' names, and add their two mean-shift convolutions for [0, 255]."""
    groups = _count(state, r"body\.(\d+)\.conv\.weight")
    blocks = _count(state, r"body\.0\.residual_group\.(\d+)\.")
    return mean_shift() | {_public_name(name, groups, blocks): value for name, value in state.items()}


_ATTENTION_OWN = {"0": "1", "2": "3"}  # basicsr counts the pooling as layer 0


def _own_name(name: str) -> str:
    match name.split("."):
        case ["head", "0", kind]:
            return f"conv_first.{kind}"
        case ["body", group, "body", block, "body", "3", "conv_du", layer, kind]:
            return f"body.{group}.residual_group.{block}.rcab.3.attention.{_ATTENTION_OWN.get(layer, layer)}.{kind}"
        case ["body", group, "body", block, "body", layer, kind]:
            return f"body.{group}.residual_group.{block}.rcab.{layer}.{kind}"
        case ["body", group, "body", _, kind]:
            return f"body.{group}.conv.{kind}"
        case ["body", _, kind]:
            return f"conv_after_body.{kind}"
        case ["tail", "0", layer, kind]:
            return f"upsample.{layer}.{kind}"
        case ["tail", "1", kind]:
            return f"conv_last.{kind}"
    return name


def _public_name(name: str, groups: int, blocks: int) -> str:
    match name.split("."):
        case ["conv_first", kind]:
            return f"head.0.{kind}"
        case ["body", group, "residual_group", block, "rcab", "3", "attention", layer, kind]:
            return f"body.{group}.body.{block}.body.3.conv_du.{int(layer) - 1}.{kind}"
        case ["body", group, "residual_group", block, "rcab", layer, kind]:
            return f"body.{group}.body.{block}.body.{layer}.{kind}"
        case ["body", group, "conv", kind]:
            return f"body.{group}.body.{blocks}.{kind}"
        case ["conv_after_body", kind]:
            return f"body.{groups}.{kind}"
        case ["upsample", layer, kind]:
            return f"tail.0.{layer}.{kind}"
        case ["conv_last", kind]:
            return f"tail.1.{kind}"
    raise KeyError(name)


def rcan_kwargs(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Arguments of the `RCAN` that a state dict (`own_names`) belongs to, or None if it belongs to another network."""
    squeeze = "body.0.residual_group.0.rcab.3.attention.1.weight"
    needed = ("conv_first.weight", squeeze, "conv_after_body.weight", "upsample.0.weight", "conv_last.weight")
    if not all(name in state for name in needed):
        return None
    feat = state["conv_first.weight"].shape[0]
    stages = sum(name.startswith("upsample.") and name.endswith(".weight") for name in state)
    return {
        "feat": feat,
        "groups": _count(state, r"body\.(\d+)\.conv\.weight"),
        "blocks": _count(state, r"body\.0\.residual_group\.(\d+)\."),
        "reduction": feat // state[squeeze].shape[0],
        "scale": 3 if state["upsample.0.weight"].shape[0] == 9 * feat else 2**stages,
    }


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number that the pattern captures in any name."""
    matches = (re.match(pattern, name) for name in state)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)
