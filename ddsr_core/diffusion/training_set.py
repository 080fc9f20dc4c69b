"""The data of a fine-tuning step: posteriors of both flips, pseudo-labels, PSNR_bic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddsr_core.diffusion.gaussian import STEPS
from ddsr_core.diffusion.latents import Latents, open_latents
from ddsr_core.errors import InputError
from ddsr_core.pseudo_labels.clusters import read_labels


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
    """The random choices of one step, for ``B`` samples.

    Attributes:
        x0, noise: ``float32 (B, C, h, w)``.
        t: 0 to 999; ``y``: rows of the class table, the null row where the label was dropped; ``labels``: pseudo-labels;
            all ``int64 (B,)``.
        psnr_bic: of the patches ``(B,)``, dB.
        corner: ``(B, 2)`` in [0, 1): where L_SR crops, if it does.
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


@dataclass(frozen=True)
class Part:
    """What one process computes at a time: a part of a batch.

    Attributes:
        on_device: the samples, on the device of the network.
        on_host: the same on the CPU, for decisions that must not wait for a GPU.
        labels, t: of the parts of all processes, in order of rank, on the CPU.
    """

    on_device: Batch
    on_host: Batch
    labels: Tensor
    t: Tensor


def parts_of(batch: Batch, device: torch.device, rank: int, processes: int, accumulate: int) -> Iterator[Part]:
    """Process ``rank``'s share of a batch on the CPU, in ``accumulate`` parts."""
    shares = [batch.part(other, processes) for other in range(processes)]
    own = shares[rank].to(device)
    for index in range(accumulate):
        beside = [share.part(index, accumulate) for share in shares]
        labels, t = torch.cat([part.labels for part in beside]), torch.cat([part.t for part in beside])
        yield Part(own.part(index, accumulate), beside[rank], labels, t)


def load_training_set(latents: Path, clusters: Path, label_map: dict[int, int]) -> TrainingSet:
    """The patches of a `latents` artifact with the pseudo-labels of a `clusters` artifact.

    Raises:
        InputError: a patch was not clustered.
    """
    label_of_patch, posteriors = read_labels(clusters), open_latents(latents)
    labels = torch.tensor([label_of(label_of_patch, name) for name in posteriors.patch_ids])
    return TrainingSet(posteriors, labels, torch.tensor([label_map[label] for label in sorted(label_map)]))


def draw_batch(
    data: TrainingSet, *, step: int, size: int, null_row: int, label_dropout: float, flip: bool, seed: int
) -> Batch:
    """Batch ``step`` of the run ``seed``. It depends on no earlier random numbers, so resuming needs no generator state.

    Latents are sampled from their posteriors. The label is dropped here, once per sample, and not inside the network; the
    minimax memories still see the pseudo-label. Random numbers come from the CPU and so are equal on every device.
    """
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
    """Samples ``float32 (B, C, h, w)`` of the chosen posteriors; their means if the VAE has no variance."""
    mean = torch.from_numpy(np.asarray(latents.mean[mirrored, chosen])).float()
    if latents.log_variance is None:
        return mean
    log_variance = torch.from_numpy(np.asarray(latents.log_variance[mirrored, chosen])).float()
    return mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)


def patches_of_step(count: int, step: int, size: int, seed: int) -> Tensor:
    """Indices ``int64 (size,)`` of a step's patches: each of ``count`` once per epoch; a batch may span two epochs."""
    first, last = step * size, (step + 1) * size - 1
    epochs = range(first // count, last // count + 1)
    seeds = (seed * 1_000_003 + 500_000 + epoch for epoch in epochs)
    orders = [torch.randperm(count, generator=torch.Generator().manual_seed(value)) for value in seeds]
    start = first - epochs[0] * count
    return torch.cat(orders)[start : start + size]


def label_of(labels: dict[str, int], patch_id: str) -> int:
    """Pseudo-label of a patch.

    Raises:
        InputError: the patch was not clustered.
    """
    if patch_id not in labels:
        raise InputError(
            f"patch {patch_id!r} has no pseudo-label",
            where="clusters",
            fix="give the clusters that were made from these patches",
        )
    return labels[patch_id]
