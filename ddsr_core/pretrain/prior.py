"""The diffusion prior of `ddsr-tiny`: a class-conditional DiT on the autoencoder's latents."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ddsr_core.diffusion.dit import DiT
from ddsr_core.diffusion.gaussian import STEPS, Schedule, q_sample, simple_and_vb
from ddsr_core.errors import TrainingError
from ddsr_core.progress import Bar, ProgressFactory, silent


@torch.inference_mode()
def encode_all(encoder: nn.Module, patches: np.ndarray, batch: int = 256, progress: ProgressFactory = silent) -> Tensor:
    """Latents of every patch and its mirror image: ``float16 (2, N, C, h, w)``."""
    both: list[list[Tensor]] = [[], []]
    with progress("Encoding patches", total=len(patches), unit="patches") as bar:
        for start in range(0, len(patches), batch):
            chunk = torch.from_numpy(np.array(patches[start : start + batch])).permute(0, 3, 1, 2).float() / 127.5 - 1
            for flipped, part in enumerate(both):
                with torch.autocast("cpu", torch.bfloat16):
                    part.append(encoder(chunk.flip(3) if flipped else chunk).half().contiguous())
            bar.advance(len(chunk))
    return torch.stack([torch.cat(part) for part in both])


def channel_statistics(latents: Tensor) -> tuple[list[float], list[float]]:
    """Per-channel mean, and one over the standard deviation, of ``(2, N, C, h, w)``."""
    flat = latents.float().permute(2, 0, 1, 3, 4).flatten(1)
    return flat.mean(1).tolist(), (1 / flat.std(1)).tolist()


@dataclass(frozen=True)
class PriorData:
    """Normalised latents ``(2, N, C, h, w)`` (as they are, mirrored) and one class a patch ``(N,)``."""

    latents: Tensor
    classes: Tensor


def prior_batch(data: PriorData, size: int, null_row: int, label_dropout: float, seed: int, step: int) -> tuple[Tensor, ...]:
    """Batch ``step`` of the run ``seed``: ``(x0, y, t, noise)``; labels are dropped once, here."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    chosen = torch.randint(data.latents.shape[1], (size,), generator=generator)
    mirrored = torch.randint(2, (size,), generator=generator)
    x0 = data.latents[mirrored, chosen].float()
    dropped = torch.rand(size, generator=generator) < label_dropout
    y = torch.where(dropped, null_row, data.classes[chosen])
    t = torch.randint(STEPS, (size,), generator=generator)
    return x0, y, t, torch.randn(x0.shape, generator=generator)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Exponential moving average with warm-up: ``min(decay, (1 + step) / (10 + step))``."""
    factor = min(decay, (1 + step) / (10 + step))
    averaged: list[Tensor] = list(ema.parameters())
    current: list[Tensor] = list(model.parameters())
    torch._foreach_lerp_(averaged, current, 1 - factor)


def train_prior(
    model: DiT,
    ema: DiT,
    optimizer: torch.optim.Optimizer,
    data: PriorData,
    *,
    steps: Iterable[int],
    total: int,
    batch_size: int,
    learning_rate: float,
    warmup: int,
    label_dropout: float,
    ema_decay: float,
    seed: int,
    bar: Bar,
) -> list[dict[str, float]]:
    """Train over ``steps`` of ``total`` (warm-up, then cosine) and return the curve, averaged over 50 steps."""
    schedule = Schedule()
    curve: list[dict[str, float]] = []
    sums = torch.zeros(2)
    for step in steps:
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total))
        rate = learning_rate * min(1.0, (step + 1) / warmup) * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate
        x0, y, t, noise = prior_batch(data, batch_size, model.config.null_row, label_dropout, seed, step)
        x_t = q_sample(schedule, x0, t, noise)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x_t, t, y)
        mse, vb = simple_and_vb(schedule, output, x0, x_t, t, noise)
        loss = mse.mean() + vb.mean()
        if not torch.isfinite(loss):
            raise TrainingError(
                "the loss of the diffusion prior is not finite",
                where=f"step {step}",
                fix="lower learning_rate",
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_ema(ema, model, step, ema_decay)
        sums += torch.stack([mse.mean().detach(), vb.mean().detach()])
        if (step + 1) % 50 == 0:
            curve.append({"step": step + 1, "mse": float(sums[0]) / 50, "vb": float(sums[1]) / 50})
            bar.note(f"mse {curve[-1]['mse']:.4f} vb {curve[-1]['vb']:.4f}")
            sums.zero_()
        bar.advance()
    return curve
