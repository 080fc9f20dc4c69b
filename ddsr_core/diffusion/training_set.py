"""What a fine-tuning step needs to know of the patches: posteriors of both flips, pseudo-labels, PSNR_bic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddsr_core.diffusion.latents import Latents, open_latents
from ddsr_core.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class TrainingSet:
    """Everything about the patches that a step needs, on the CPU.

    Attributes:
        latents: posteriors of the patches and their mirror images.
        labels: pseudo-labels ``int64 (N,)``.
        rows: pseudo-label -> row of the class table, ``int64 (k,)``.
    """

    latents: Latents
    labels: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Batch:
    """One step's random choices, ``B`` samples.

    Attributes:
        x0, noise: ``float32 (B, C, h, w)``.
        t: 0 … 999; ``y``: rows of the class table, the null row where the label was dropped; ``labels``: pseudo-labels;
            all ``int64 (B,)``.
        psnr_bic: of the patches ``(B,)``, dB.
        corner: ``(B, 2)`` in [0, 1): where L_SR cuts its crop, if it cuts one.
    """

    x0: Tensor
    noise: Tensor
    t: Tensor
    y: Tensor
    labels: Tensor
    psnr_bic: Tensor
    corner: Tensor

    def __len__(self) -> int:
        return len(self.t)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})

    def part(self, index: int, count: int) -> Batch:
        """The ``index``-th of ``count`` equal, consecutive parts."""
        size = len(self) // count
        return Batch(**{name: value[index * size : (index + 1) * size] for name, value in vars(self).items()})


def load_training_set(latents: Path, clusters: Path, label_map: dict[int, int]) -> TrainingSet:
    """The patches of a `latents` artifact with the pseudo-labels of a `clusters` artifact.

    Raises:
        InputError: a patch was not clustered.
    """
    import torch

    from ddsr_core.pseudo_labels.clusters import read_labels

    known, posteriors = read_labels(clusters), open_latents(latents)
    labels = torch.tensor([label_of(known, name) for name in posteriors.patch_ids])
    return TrainingSet(posteriors, labels, torch.tensor([label_map[label] for label in sorted(label_map)]))


def draw_batch(
    data: TrainingSet, *, step: int, size: int, null_row: int, label_dropout: float, flip: bool, seed: int
) -> Batch:
    """Batch ``step`` of the run ``seed``, whatever was drawn before it: a resumed run needs no generator's state.

    Latents are drawn from their posteriors. The label is dropped here, once a sample, and not inside the network; the
    pseudo-label stays known to the minimax memories. Random numbers come from the CPU and so are equal on every device.
    """
    import torch

    from ddsr_core.diffusion.gaussian import STEPS

    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    chosen = patches_of_step(len(data), step, size, seed)
    mirrored = torch.randint(2, (size,), generator=generator) * int(flip)
    dropped = torch.rand(size, generator=generator) < label_dropout
    t = torch.randint(STEPS, (size,), generator=generator)
    labels = data.labels[chosen]
    y = torch.where(dropped, null_row, data.rows[labels])
    x0 = draw_latents(data.latents, mirrored.numpy(), chosen.numpy(), generator)
    noise = torch.randn(x0.shape, generator=generator)
    psnr_bic = torch.from_numpy(data.latents.psnr_bic[chosen.numpy()])
    return Batch(x0, noise, t, y, labels, psnr_bic, torch.rand(size, 2, generator=generator))


def draw_latents(latents: Latents, mirrored: np.ndarray, chosen: np.ndarray, generator: torch.Generator) -> Tensor:
    """Samples ``float32 (B, C, h, w)`` of the chosen posteriors; their means where the VAE has no variance."""
    import torch

    mean = torch.from_numpy(np.asarray(latents.mean[mirrored, chosen])).float()
    if latents.log_variance is None:
        return mean
    log_variance = torch.from_numpy(np.asarray(latents.log_variance[mirrored, chosen])).float()
    return mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)


def patches_of_step(count: int, step: int, size: int, seed: int) -> Tensor:
    """Indices ``int64 (size,)`` of step's patches: each of ``count`` once an epoch; a batch may reach into the next."""
    import torch

    first, last = step * size, (step + 1) * size - 1
    epochs = range(first // count, last // count + 1)
    seeds = (seed * 1_000_003 + 500_000 + epoch for epoch in epochs)
    orders = [torch.randperm(count, generator=torch.Generator().manual_seed(value)) for value in seeds]
    start = first - epochs[0] * count
    return torch.cat(orders)[start : start + size]


def label_of(labels: dict[str, int], patch_id: str) -> int:
    """Pseudo-label of a patch.

    Raises:
        InputError: it was not clustered.
    """
    if patch_id not in labels:
        raise InputError(
            f"patch {patch_id!r} has no pseudo-label",
            where="clusters",
            fix="give the clusters that were made from these patches",
        )
    return labels[patch_id]
