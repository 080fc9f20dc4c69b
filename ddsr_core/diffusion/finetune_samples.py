"""Samples of the averaged adapter during fine-tuning: sample sheets, and the texture that determines the weight of L_SR."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddsr_core.diffusion.finetune_trainer import FinetuneTrainer
from ddsr_core.diffusion.samplers import sample_latents
from ddsr_core.diffusion.training_set import TrainingSet
from ddsr_core.imaging.bicubic import psnr_bic
from ddsr_core.imaging.images import from_signed, save_png, to_uint8

#: Images per forward pass, and pixels that are decoded at once: a decoder's feature maps are large.
SAMPLE_BATCH, DECODED_PX = 16, 2**18


@dataclass(frozen=True)
class SampleCost:
    """How much is sampled during fine-tuning. Little, as it interrupts training.

    Attributes:
        labels, columns: of a sheet: largest number of pseudo-labels, and images per pseudo-label.
        texture_images: smallest number of images that texture is measured on.
        steps: sampling steps of DPM-Solver++.
    """

    labels: int
    columns: int
    texture_images: int
    steps: int


SMALL = SampleCost(labels=16, columns=4, texture_images=42, steps=12)
#: With DiT-XL/2-512 a sheet of 7 images costs 76 TFLOP, as much as 36 training samples; texture 230 TFLOP.
LARGE = SampleCost(labels=8, columns=1, texture_images=21, steps=8)
#: Images with larger sides are sampled at the cost of `LARGE`.
SMALL_PX = 128


def sample_cost(image_px: int) -> SampleCost:
    """What is sampled of a base model with images of this size."""
    return SMALL if image_px <= SMALL_PX else LARGE


def measure_texture(trainer: FinetuneTrainer, data: TrainingSet) -> tuple[float, float]:
    """Mean PSNR_bic, dB, of samples of the averaged adapter, from the same noise each time, and of the patches.

    Every pseudo-label has the same weight on both sides, as in the distilled set.
    """
    labels = sorted(trainer.label_map)
    per_label = -(-sample_cost(trainer.base.image_px).texture_images // len(labels))
    with trainer.averaged():
        images = sample_images(trainer, [trainer.label_map[label] for label in labels for _ in range(per_label)])
    real = torch.from_numpy(data.latents.psnr_bic)
    of_labels = torch.stack([real[data.labels == label].mean() for label in labels if (data.labels == label).any()])
    return float(psnr_bic(images, scale=trainer.config.scale).mean()), float(of_labels.mean())


def write_sheet(trainer: FinetuneTrainer, out: Path) -> Path:
    """``samples/step-000100.png``: one row per pseudo-label, sampled by the averaged adapter from the same noise."""
    path = out / "samples" / f"step-{trainer.step:06d}.png"
    with trainer.averaged():
        save_png(path, sample_sheet(trainer))
    return path


def sample_sheet(trainer: FinetuneTrainer) -> np.ndarray:
    """``uint8 (rows * H, columns * W, 3)``."""
    cost = sample_cost(trainer.base.image_px)
    rows = [row for _, row in sorted(trainer.label_map.items())][: cost.labels]
    images = sample_images(trainer, [row for row in rows for _ in range(cost.columns)])
    grid = images.unflatten(0, (len(rows), cost.columns))  # (rows, columns, 3, H, W)
    return to_uint8(grid.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[None])[0]


def sample_images(trainer: FinetuneTrainer, rows: list[int]) -> Tensor:
    """Images ``float32 (len(rows), 3, H, W)`` in [0, 1], on the CPU, one for each row of the class table."""
    device, base, parts = trainer.loss.device, trainer.base, []
    half, steps = trainer.config.precision == "bf16", sample_cost(base.image_px).steps
    at_once = max(1, DECODED_PX // base.image_px**2)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        for start in range(0, len(rows), SAMPLE_BATCH):
            chunk = torch.tensor(rows[start : start + SAMPLE_BATCH], device=device)
            indices = list(range(start, start + len(chunk)))
            latents = sample_latents(
                base.dit, chunk, indices, seed=trainer.config.seed, sampler="dpmpp", steps=steps, guidance_scale=1.0
            )
            parts += [from_signed(base.decode(part).float()).clamp(0, 1).cpu() for part in latents.split(at_once)]
    return torch.cat(parts)
