"""Restored detail: HR images whose detail is what an SR network restores from their own LR images.

What an SR network can learn from a pair is the part of HR that follows from LR; the rest, the chance of a texture and the
faults of a decoder, is noise in its targets. Seventy images are too few to average that noise away. Here each drawn image
goes down to its LR and up again by the network that teachers candidates, trained on the accepted patches of the same photos,
so that the set's targets hold what that network has learned from all of them. The idea is that of soft labels in dataset
distillation (Sun et al., RDED, CVPR 2024) and of HR images made by a teacher (IDC, arXiv 2505.21099); its use on images
drawn by diffusion, with a teacher trained from nothing, is our own addition. The paper has nothing like it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddsr_core.config import Runtime

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH = 32


def restore(network: nn.Module, images: Tensor, share: float) -> Tensor:
    """Images with a share of their detail replaced by what ``network`` restores from their LR images.

    Args:
        network: ``(B, 3, h, w)`` in [0, 1] to four times the size, on the images' device.
        images: float32 ``(B, 3, H, W)`` in [0, 1], H and W multiples of 4.
        share: 0 keeps the images, 1 gives the network's.

    Returns:
        float32 ``(B, 3, H, W)`` in [0, 1].
    """
    import torch

    from ddsr_core.imaging.bicubic import make_lr

    with torch.no_grad():
        return torch.lerp(images, network(make_lr(images)).clamp(0, 1), share)


def restored_files(teacher: Path, paths: Sequence[Path], share: float, runtime: Runtime) -> Iterator[np.ndarray]:
    """`restore` on image files of one size, by the network of a train_sr artifact; ``uint8 (H, W, 3)`` each.

    Raises:
        InputError: no network there.
    """
    from ddsr_core.imaging.decode import read_rgb
    from ddsr_core.imaging.images import to_float, to_uint8
    from ddsr_core.sr.weights import load_network

    network = load_network(teacher).module.to(runtime.device)
    with runtime.progress("Restoring detail", total=len(paths), unit="images") as bar:
        for start in range(0, len(paths), BATCH):
            batch = paths[start : start + BATCH]
            images = to_float(np.stack([read_rgb(path) for path in batch])).to(runtime.device)
            yield from to_uint8(restore(network, images, share))
            bar.advance(len(batch))
