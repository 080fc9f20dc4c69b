"""What a fine-tuning step needs to know of the patches: latents of both flips, pseudo-labels, PSNR_bic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddsr_core.config import Runtime
from ddsr_core.errors import InputError
from ddsr_core.store import RESUME, write_atomically

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ddsr_core.diffusion.base import Base

ENCODE_BATCH = 16


@dataclass(frozen=True)
class TrainingSet:
    """Everything about the patches that a step needs, on the CPU.

    Attributes:
        latents: ``float16 (2, N, C, h, w)``: as they are, mirrored (the encoder does not commute with a flip).
        labels: pseudo-labels ``int64 (N,)``.
        psnr_bic: of the patches, antialiased kernel, ``float32 (N,)``, dB.
        rows: pseudo-label -> row of the class table, ``int64 (k,)``.
    """

    latents: Tensor
    labels: Tensor
    psnr_bic: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Batch:
    """One step's random choices: ``x0, noise (B, C, h, w)``, ``t, y (table rows), labels, psnr_bic (B,)``."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    y: Tensor
    labels: Tensor
    psnr_bic: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


def draw_batch(
    data: TrainingSet, *, step: int, size: int, null_row: int, label_dropout: float, flip: bool, seed: int
) -> Batch:
    """Batch ``step`` of the run ``seed``, whatever was drawn before it: a resumed run needs no generator's state.

    The label is dropped here, once a sample, and not inside the network. The pseudo-label stays known to the minimax
    memories. Random numbers are drawn on the CPU and so are equal on every device.
    """
    import torch

    from ddsr_core.diffusion.gaussian import STEPS

    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    chosen = patches_of_step(len(data.labels), step, size, seed)
    mirrored = torch.randint(2, (size,), generator=generator) * int(flip)
    dropped = torch.rand(size, generator=generator) < label_dropout
    t = torch.randint(STEPS, (size,), generator=generator)
    x0 = data.latents[mirrored, chosen].float()
    labels = data.labels[chosen]
    y = torch.where(dropped, null_row, data.rows[labels])
    return Batch(x0, torch.randn(x0.shape, generator=generator), t, y, labels, data.psnr_bic[chosen])


def patches_of_step(count: int, step: int, size: int, seed: int) -> Tensor:
    """Indices ``int64 (size,)`` of step's patches: each of ``count`` once an epoch; a batch may reach into the next."""
    import torch

    first, last = step * size, (step + 1) * size - 1
    epochs = range(first // count, last // count + 1)
    orders = [
        torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + 500_000 + epoch))
        for epoch in epochs
    ]
    start = first - epochs[0] * count
    return torch.cat(orders)[start : start + size]


def prepare(
    base: Base, patches: Path, clusters: Path, label_map: dict[int, int], out: Path, runtime: Runtime
) -> TrainingSet:
    """Encode every patch and its mirror image once; kept in ``out/resume``.

    Raises:
        InputError: the patches have another size than the base makes, or are not those that were clustered.
    """
    import torch
    from safetensors.torch import load, save

    from ddsr_core.clusters import read_labels

    path = out / RESUME / "latents.safetensors"
    if not path.exists():
        write_atomically(path, save(encode_patches(base, patches, read_labels(clusters), runtime)))
    rows = torch.tensor([label_map[label] for label in sorted(label_map)])
    return TrainingSet(**load(path.read_bytes()), rows=rows)


def encode_patches(base: Base, patches: Path, labels: dict[str, int], runtime: Runtime) -> dict[str, Tensor]:
    """``latents``, ``labels`` and ``psnr_bic`` of all patches, in their order (see `TrainingSet`)."""
    import torch

    from ddsr_core.bicubic import psnr_bic
    from ddsr_core.images import to_float, to_signed

    parts: dict[str, list[Tensor]] = {"plain": [], "mirrored": [], "psnr_bic": []}
    ordered: list[int] = []
    with runtime.progress("Encoding patches", total=len(labels), unit="patches") as bar, torch.inference_mode():
        for names, images in batches_of_patches(patches, base.image_px):
            x = to_float(images).to(runtime.device)
            parts["plain"].append(base.encode(to_signed(x)).half().cpu())
            parts["mirrored"].append(base.encode(to_signed(x.flip(3))).half().cpu())
            parts["psnr_bic"].append(psnr_bic(x).cpu())
            ordered += [label_of(labels, name) for name in names]
            bar.advance(len(names))
    latents = torch.stack([torch.cat(parts["plain"]), torch.cat(parts["mirrored"])]).contiguous()
    return {"latents": latents, "labels": torch.tensor(ordered), "psnr_bic": torch.cat(parts["psnr_bic"])}


def label_of(labels: dict[str, int], patch_id: str) -> int:
    """Pseudo-label of a patch.

    Raises:
        InputError: it was not clustered.
    """
    if patch_id not in labels:
        raise InputError(
            f"patch {patch_id!r} has no pseudo-label",
            where="clusters",
            mend="give the clusters that were made from these patches",
        )
    return labels[patch_id]


def batches_of_patches(patches: Path, image_px: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """Ids and pixels ``uint8 (n, H, W, 3)`` of the accepted patches, a few at a time.

    Raises:
        InputError: a patch has another size than ``image_px``.
    """
    from ddsr_core.images import decode_rgb, read_image_parquet

    names: list[str] = []
    images: list[np.ndarray] = []
    for row in read_image_parquet(patches, ["image", "patch_id"]):
        image = decode_rgb(row["image"]["bytes"], row["patch_id"])
        if image.shape[:2] != (image_px, image_px):
            raise InputError(
                f"the base makes images of {image_px}x{image_px}, the patches are {image.shape[1]}x{image.shape[0]}",
                where="patches.patch_px",
                mend=f"set patches.patch_px={image_px}, or choose another base",
            )
        names.append(row["patch_id"])
        images.append(image)
        if len(names) == ENCODE_BATCH:
            yield names, np.stack(images)
            names, images = [], []
    if names:
        yield names, np.stack(images)
