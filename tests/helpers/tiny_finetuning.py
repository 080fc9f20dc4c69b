"""Fine-tuning of the random base model of 16-pixel images: a config, its inputs, and single steps of it."""

import csv
from pathlib import Path

import torch

from ddsr_core.diffusion.base import Base, load_base
from ddsr_core.diffusion.config import FinetuneConfig
from ddsr_core.diffusion.finetune_trainer import FinetuneTrainer
from ddsr_core.diffusion.training_set import Batch, Part, TrainingSet, draw_batch, load_training_set, parts_of
from ddsr_core.distributed import SingleProcess
from tests.helpers.tiny_base import SHAPE, write_base, write_clusters, write_latents, write_patches

CONFIG = FinetuneConfig(
    steps=12, epochs=None, batch_size=6, gamma_blocks=2, memory_size=5, ema_decay=0.9,
    norm_every=5, checkpoint_every=4, sample_every=6, lsr_adapt_every=3,
)  # fmt: skip

LABEL_MAP = {0: 0, 1: 1, 2: 2}


def write_inputs(home: Path) -> dict[str, Path]:
    """Latents, clusters and base model: the inputs of the stage."""
    patches, base = write_patches(home / "patches"), write_base(home / "base")
    return {
        "latents": write_latents(home / "latents", patches, base),
        "clusters": write_clusters(home / "clusters"),
        "base": base,
    }


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def load_inputs(inputs: dict[str, Path], device: str = "cpu") -> tuple[Base, TrainingSet]:
    return load_base(str(inputs["base"]), device), load_training_set(inputs["latents"], inputs["clusters"], LABEL_MAP)


def terms_of(state: FinetuneTrainer, batch: Batch) -> dict[str, torch.Tensor]:
    return state.loss.terms(only_part(batch), state.memories, SingleProcess())[0]


def only_part(batch: Batch) -> Part:
    """The batch as the only part of a step."""
    (part,) = parts_of(batch, torch.device("cpu"), rank=0, processes=1, accumulate=1)
    return part


def draw(data: TrainingSet, *, step: int = 0, size: int = 6, label_dropout: float = 0.1, flip: bool = True) -> Batch:
    return draw_batch(data, step=step, size=size, null_row=SHAPE.null_row, label_dropout=label_dropout, flip=flip, seed=0)
