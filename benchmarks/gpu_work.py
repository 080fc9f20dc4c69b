"""What `benchmarks.gpu` measures: a matrix product, fine-tuning steps, sampling with decoding."""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.decoders import SdDecoder, TinyDecoder
from ddsr_core.diffusion.base import Base, BaseInfo
from ddsr_core.diffusion.codec import Codec
from ddsr_core.diffusion.config import FinetuneConfig
from ddsr_core.diffusion.difffit import unfreeze
from ddsr_core.diffusion.dit import DIT_XL_2_512, DiT, DiTConfig
from ddsr_core.diffusion.finetune_trainer import FinetuneTrainer
from ddsr_core.diffusion.gaussian import STEPS
from ddsr_core.diffusion.latents import Latents
from ddsr_core.diffusion.samplers import sample_latents
from ddsr_core.diffusion.training_set import TrainingSet

LABELS, GAMMA_BLOCKS, SAMPLES = 7, 14, 70_000
SAMPLING_STEPS, GOAL_IMAGES, DECODE_BATCH = 25, 420, 8
WARM_UP = 3
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Sizes of networks, batches and data: the paper's, or small ones to try the script on a CPU."""

    shape: DiTConfig
    taesd_width: int
    sd_width: int
    matmul: int
    batches: tuple[int, ...]
    timed_steps: int
    images: int
    sample_batch: int
    patches: int


FULL = Size(DIT_XL_2_512, 64, 128, 8192, (8, 16, 32, 64), 10, GOAL_IMAGES, 32, 256)
TINY = Size(DiTConfig(latent_px=8, hidden=32, depth=2, heads=2), 4, 4, 64, (2,), 2, 3, 2, 16)


@dataclass(frozen=True)
class Cell:
    """One way to train."""

    batch: int
    lsr: bool
    checkpointing: bool
    compiled: bool


class DecoderOnly:
    """The part of an ``AutoencoderKL`` that decoding needs."""

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder

    def decode(self, latents: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.decoder(latents))


class Models:
    """DiT and decoders with random weights (a GPU is faster on zeros)."""

    def __init__(self, size: Size, device: str) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            dit, taesd, sd = DiT(size.shape), TinyDecoder(size.taesd_width), SdDecoder(size.sd_width)
        for parameter in dit.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.02)
        for module in (dit, taesd, sd):
            module.requires_grad_(False).eval()
        self.size, self.device = size, torch.device(device)
        self.taesd = Codec(DecoderOnly(taesd), (0.0,) * 4, (1.0,) * 4)
        self.sd = Codec(DecoderOnly(sd), (0.0,) * 4, (0.18215,) * 4)
        info = BaseInfo(
            name="random", image_px=8 * size.shape.latent_px, dit={}, vae_class="AutoencoderKL",
            latent_shift=self.sd.shift, latent_scale=self.sd.scale,
        )  # fmt: skip
        self.base = Base(dit, self.sd, info, digest="random", class_names={})

    def training_set(self) -> TrainingSet:
        size, generator = self.size, np.random.default_rng(0)
        shape = (2, size.patches, 4, size.shape.latent_px, size.shape.latent_px)
        mean = generator.standard_normal(shape, np.float32).astype(np.float16)
        names = [str(index) for index in range(size.patches)]
        latents = Latents(names, np.full(size.patches, 25.0, np.float32), mean, np.full(shape, -6.0, np.float16))
        return TrainingSet(latents, torch.arange(size.patches) % LABELS, torch.arange(LABELS))


class Marks:
    """Points in time on the device; on a GPU they do not synchronize."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.points: list[Any] = []
        self.add()

    def add(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.points.append(event)
        else:
            self.points.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From each point to the next."""
        pairs = list(zip(self.points, self.points[1:], strict=False))
        if self.device.type != "cuda":
            return [after - before for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]


def free_memory(device: torch.device) -> None:
    """Release the memory of earlier measurements and reset the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None


def matmul_rate(size: int, device: torch.device) -> float:
    """TFLOP/s of a square bf16 product of random matrices: the ceiling for all shares."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(WARM_UP):
        a @ b
    marks = Marks(device)
    for _ in range(20):
        a @ b
        marks.add()
    return 2 * size**3 / statistics.median(marks.seconds()) / 1e12


def tflop_of(function: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops()) / 1e12


def count_tflop(size: Size) -> dict[str, float]:
    """TFLOP (2 operations per multiply-add) for one sample, counted on tensors without storage, not timed.

    ``train`` is the forward pass and DiffFit's backward pass; ``lsr`` is the average cost of L_SR, which decodes the real
    and the predicted latent at low t only. Recomputed blocks are not counted.
    """
    with torch.device("meta"):
        dit, taesd, sd = DiT(size.shape), TinyDecoder(size.taesd_width), SdDecoder(size.sd_width)
        latent = torch.zeros(1, 4, size.shape.latent_px, size.shape.latent_px)
        t = torch.zeros(1, dtype=torch.long)
    dit.requires_grad_(False)
    forward = tflop_of(lambda: dit(latent, t, t))
    unfreeze(dit, GAMMA_BLOCKS)
    taesd.requires_grad_(False)
    with_gradient = latent.clone().requires_grad_()
    decoding = tflop_of(lambda: taesd(latent)) + tflop_of(lambda: taesd(with_gradient).sum().backward())
    return {
        "forward": forward,
        "train": tflop_of(lambda: dit(latent, t, t).sum().backward()),
        "lsr": decoding * (FinetuneConfig().lsr_last_step + 1) / STEPS,
        "sd_decode": tflop_of(lambda: sd(latent)),
        "taesd_decode": tflop_of(lambda: taesd(latent)),
    }


def train(models: Models, data: TrainingSet, cell: Cell, tflop: dict[str, float], ceiling: float) -> Row:
    """Whole optimizer steps of `FinetuneTrainer.advance`, drawing from the posteriors included."""
    if cell.compiled:
        torch.compiler.reset()
    config = FinetuneConfig(
        batch_size=cell.batch, gamma_blocks=GAMMA_BLOCKS, lsr_mode="target" if cell.lsr else "off",
        checkpointing="on" if cell.checkpointing else "off", compile=cell.compiled,
    )  # fmt: skip
    run = FinetuneTrainer(models.base, config, {label: label for label in range(LABELS)}, decoder=models.taesd)
    started = time.perf_counter()
    for _ in range(WARM_UP):  # the first step measures gradient norms: its memory counts in the peak
        run.advance(data)
    warm_up = time.perf_counter() - started
    marks = Marks(models.device)
    for _ in range(models.size.timed_steps):
        run.advance(data)
        marks.add()
    step = statistics.median(marks.seconds())
    run.step = config.norm_every
    marks = Marks(models.device)
    run.advance(data)
    marks.add()
    with_norms = marks.seconds()[0]
    average = step + (with_norms - step) / config.norm_every
    rate = cell.batch * (tflop["train"] + cell.lsr * tflop["lsr"]) / step
    return {
        **asdict(cell),
        "step_ms": 1e3 * step,
        "norm_step_ms": 1e3 * with_norms,
        "samples_s": cell.batch / step,
        "tflop_s": rate,
        "share": rate / ceiling,
        "peak_gib": peak_gib(models.device),
        "minutes_70k_extrapolated": SAMPLES / cell.batch * average / 60,
        "warm_up_s": warm_up,
    }


def available_sampler() -> str:
    """DPM-Solver++ comes from diffusers; the ancestral sampler calls the network equally often."""
    return "dpmpp" if importlib.util.find_spec("diffusers") else "ancestral"


@torch.inference_mode()
def sample(models: Models, guidance: float, tflop: dict[str, float], ceiling: float, seconds: float) -> Row:
    """Sample images and decode them to uint8 on the CPU; stops early after ``seconds``."""
    size, device, sampler = models.size, models.device, available_sampler()

    def sampled(start: int, count: int, steps: int) -> Tensor:
        rows = torch.arange(start, start + count, device=device) % LABELS
        indices = list(range(start, start + count))
        with torch.autocast(device.type, torch.bfloat16):
            latents = sample_latents(
                models.base.dit, rows, indices, seed=0, sampler=sampler, steps=steps, guidance_scale=guidance,
            )  # fmt: skip
            images = [((models.sd.decode(part).float() + 1) * 127.5).round() for part in latents.split(DECODE_BATCH)]
        return torch.cat(images).clamp(0, 255).to(torch.uint8).cpu()

    sampled(0, min(size.sample_batch, size.images), 2)
    started, done = time.perf_counter(), 0
    while done < size.images and time.perf_counter() - started < seconds:
        done += len(sampled(done, min(size.sample_batch, size.images - done), SAMPLING_STEPS))
    took = time.perf_counter() - started  # `sampled` ends in a copy to the CPU, which waits for the GPU
    calls = SAMPLING_STEPS * (1 if guidance == 1.0 else 2)
    rate = done * (calls * tflop["forward"] + tflop["sd_decode"]) / took
    return {
        "sampler": sampler,
        "steps": SAMPLING_STEPS,
        "guidance": guidance,
        "batch": size.sample_batch,
        "images": done,
        "seconds": took,
        "images_s": done / took,
        "tflop_s": rate,
        "share": rate / ceiling,
        "peak_gib": peak_gib(device),
        "seconds_420": GOAL_IMAGES * took / done,
    }
