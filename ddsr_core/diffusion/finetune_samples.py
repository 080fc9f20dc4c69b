"""Samples of the averaged adapter during fine-tuning: sheets to look at, and the texture that L_SR is weighed by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddsr_core.diffusion.finetune_trainer import FinetuneTrainer
from ddsr_core.diffusion.samplers import sample_latents
from ddsr_core.diffusion.training_set import TrainingSet
from ddsr_core.imaging.bicubic import psnr_bic
from ddsr_core.imaging.images import from_signed, save_png, to_uint8

#: A sample sheet: at most this many pseudo-labels, images of each, and DPM-Solver++ steps. Few, as it interrupts training.
SHEET_LABELS, SHEET_COLUMNS, SHEET_STEPS = 16, 4, 12
#: Images that are sampled to measure texture, and images per forward pass.
TEXTURE_SAMPLES, SAMPLE_BATCH = 42, 16


def measure_texture(trainer: FinetuneTrainer, data: TrainingSet) -> tuple[float, float]:
    """Mean PSNR_bic, dB, of `TEXTURE_SAMPLES` samples of the averaged adapter, from the same noise each time, and of the
    patches.

    Every pseudo-label has the same weight on both sides, as in the distilled set.
    """
    labels = sorted(trainer.label_map)
    per_label = -(-TEXTURE_SAMPLES // len(labels))
    with trainer.averaged():
        images = sample_images(trainer, [trainer.label_map[label] for label in labels for _ in range(per_label)])
    real = torch.from_numpy(data.latents.psnr_bic)
    of_labels = torch.stack([real[data.labels == label].mean() for label in labels if (data.labels == label).any()])
    return float(psnr_bic(images).mean()), float(of_labels.mean())


def write_sheet(trainer: FinetuneTrainer, out: Path) -> None:
    """``samples/step-000100.png``: one row per pseudo-label, sampled by the averaged adapter from the same noise."""
    with trainer.averaged():
        save_png(out / "samples" / f"step-{trainer.step:06d}.png", sample_sheet(trainer))


def sample_sheet(trainer: FinetuneTrainer) -> np.ndarray:
    """``uint8 (rows * H, columns * W, 3)``."""
    rows = [row for _, row in sorted(trainer.label_map.items())][:SHEET_LABELS]
    images = sample_images(trainer, [row for row in rows for _ in range(SHEET_COLUMNS)])
    grid = images.unflatten(0, (len(rows), SHEET_COLUMNS))  # (rows, columns, 3, H, W)
    return to_uint8(grid.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[None])[0]


def sample_images(trainer: FinetuneTrainer, rows: list[int]) -> Tensor:
    """Images ``float32 (len(rows), 3, H, W)`` in [0, 1], on the CPU, one for each row of the class table."""
    device, parts = trainer.loss.device, []
    half = trainer.config.precision == "bf16"
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        for start in range(0, len(rows), SAMPLE_BATCH):
            chunk = torch.tensor(rows[start : start + SAMPLE_BATCH], device=device)
            indices = list(range(start, start + len(chunk)))
            latents = sample_latents(
                trainer.base.dit, chunk, indices, seed=trainer.config.seed, sampler="dpmpp", steps=SHEET_STEPS,
                guidance_scale=1.0,
            )  # fmt: skip
            parts.append(from_signed(trainer.base.decode(latents).float()).clamp(0, 1).cpu())
    return torch.cat(parts)
