"""Validation grids: what the averaged network makes of a few fixed crops, seen now and then while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddsr_core.imaging.contact_sheet import contact_sheet
from ddsr_core.imaging.images import save_png, to_float, to_uint8
from ddsr_core.sr.data import Pairs

if TYPE_CHECKING:
    import torch
    from torch import nn

CROPS = 4
#: No training step has this number: the crops of the grid are drawn once, and not turned.
_GRID_DRAW = 2**40


def write_grid(path: Path, network: nn.Module, pairs: Pairs, seed: int, device: torch.device) -> None:
    """A PNG with a row for each of `CROPS` crops of the training images: LR enlarged bicubically | SR | HR.

    Args:
        path: the file.
        network: in evaluation mode; ``(1, 3, p, p)`` to ``(1, 3, scale p, scale p)``, run in float32.
        pairs: where the crops come from, the same for the same seed.
        seed: of the run.
        device: of the network.
    """
    import torch

    from ddsr_core.imaging.bicubic import upsample

    draw = pairs.draw(seed, _GRID_DRAW, CROPS)
    lr, hr = pairs.cut(draw._replace(turns=np.zeros_like(draw.turns)))
    images: list[np.ndarray] = []
    for small, large in zip(lr, hr, strict=True):
        x = to_float(small).to(device)
        with torch.no_grad():
            images += [to_uint8(upsample(x, pairs.scale))[0], to_uint8(network(x))[0], large]
    save_png(path, contact_sheet(images, columns=3, px=hr.shape[1]))
