"""Detail restoration: HR images whose detail is replaced by what an SR network reconstructs from their own LR images.

An SR network can learn from a pair only the part of HR that follows from LR. The rest, random texture and decoder
artifacts, is noise in its targets, and seventy images are too few to average it away. Here each selected image is
reduced to LR and enlarged by the teacher, a network trained on the accepted patches of the same photos, so that the targets
hold what that network learned from all of them. Related: soft labels in dataset distillation (Sun et al., RDED, CVPR 2024)
and HR images made by a teacher (IDC, arXiv 2505.21099). Its use on images sampled by diffusion, with a teacher trained from
scratch, is our own addition to the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ddsr_core.config import Runtime
from ddsr_core.imaging.bicubic import crop_to_multiple, make_lr
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.images import to_float, to_uint8
from ddsr_core.imaging.kernel import SCALE
from ddsr_core.sr.weights import load_network

#: Images per forward pass.
BATCH = 32


@torch.no_grad()
def restore(network: nn.Module, images: Tensor, share: float, scale: int = SCALE) -> Tensor:
    """Images with a share of their detail replaced by the network's reconstruction from their LR images.

    Args:
        network: ``(B, 3, h, w)`` in [0, 1] to ``scale`` times the size, on the images' device.
        images: float32 ``(B, 3, H, W)`` in [0, 1]. Rows and columns beyond a multiple of ``scale`` stay as they are.
        share: 0 returns the images, 1 the network's output.

    Returns:
        float32 ``(B, 3, H, W)`` in [0, 1].
    """
    inside = crop_to_multiple(images, scale)
    restored = images.clone()
    restored[..., : inside.shape[-2], : inside.shape[-1]] = torch.lerp(
        inside, network(make_lr(inside, scale)).clamp(0, 1), share
    )
    return restored


def restored_files(teacher: Path, paths: Sequence[Path], share: float, runtime: Runtime) -> Iterator[np.ndarray]:
    """`restore` on image files of one size, by the network of a train_sr artifact; yields ``uint8 (H, W, 3)``.

    Raises:
        InputError: ``teacher`` holds no network.
    """
    loaded = load_network(teacher, trust=True)
    network = loaded.module.to(runtime.device)
    with runtime.progress("Restoring detail", total=len(paths), unit="images") as bar:
        for start in range(0, len(paths), BATCH):
            batch = paths[start : start + BATCH]
            images = to_float(np.stack([read_rgb(path) for path in batch])).to(runtime.device)
            yield from to_uint8(restore(network, images, share, loaded.scale))
            bar.advance(len(batch))
