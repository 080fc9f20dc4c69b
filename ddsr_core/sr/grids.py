"""Sample grids: a few fixed training crops, enlarged by the averaged network at intervals during training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from ddsr_core.imaging.bicubic import upsample
from ddsr_core.imaging.contact_sheet import contact_sheet
from ddsr_core.imaging.images import save_png, to_float, to_uint8
from ddsr_core.sr.data import Pairs

CROPS = 4
#: The step number that the crops of the grid are sampled with; no training step reaches it.
_GRID_DRAW = 2**40


def write_grid(path: Path, network: nn.Module, pairs: Pairs, seed: int, device: torch.device) -> None:
    """Write a PNG with one row for each of `CROPS` training crops: bicubic | SR | HR.

    Args:
        path: the file to write.
        network: in evaluation mode, ``(1, 3, p, p)`` to ``(1, 3, scale p, scale p)``; run in float32.
        pairs: training pairs. The same seed gives the same crops.
        seed: seed of the training.
        device: device of the network.
    """
    draw = pairs.draw(seed, _GRID_DRAW, CROPS)
    lr, hr = pairs.cut(draw._replace(turns=np.zeros_like(draw.turns)))
    images: list[np.ndarray] = []
    for small, large in zip(lr, hr, strict=True):
        x = to_float(small).to(device)
        with torch.no_grad():
            images += [to_uint8(upsample(x, pairs.scale))[0], to_uint8(network(x))[0], large]
    save_png(path, contact_sheet(images, columns=3, px=hr.shape[1]))
