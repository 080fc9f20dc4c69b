"""The units of work that stages repeat, each the real code run once on fake tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ddsr_core.baselines.config import GSDDConfig
from ddsr_core.baselines.gsdd import augment, features
from ddsr_core.diffusion.config import FinetuneConfig
from ddsr_core.diffusion.finetune_trainer import FinetuneTrainer
from ddsr_core.diffusion.gaussian import STEPS
from ddsr_core.diffusion.latents import Latents
from ddsr_core.diffusion.memory import choose_checkpointing
from ddsr_core.diffusion.samplers import guided
from ddsr_core.diffusion.training_set import Batch, TrainingSet, draw_batch
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.evaluation.evaluator import Evaluator, ReferenceFeatures
from ddsr_core.imaging.bicubic import psnr_bic, upsample
from ddsr_core.imaging.images import to_signed
from ddsr_core.imaging.tiling import enlarge
from ddsr_core.planning.config import Machine
from ddsr_core.planning.counting import Answers, Count, counting, mixed
from ddsr_core.planning.shapes import BaseShape, make_base, make_codec, make_embedder
from ddsr_core.pseudo_labels.config import EmbeddingsConfig
from ddsr_core.sampling.config import SampleConfig
from ddsr_core.sampling.restoration import restore
from ddsr_core.sr.architectures import find_architecture
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.networks import build_network
from ddsr_core.sr.plan import plan_of
from ddsr_core.sr.state import State, join_adversary, new_state
from ddsr_core.sr.train_sr import train_step

GIB = 2**30
#: Noisier steps than this are not counted in a run: a batch with more samples for L_SR than come once in a run.
ONCE = 1.0


def embed(config: EmbeddingsConfig, side_px: int, batch: int) -> Count:
    """One batch of square patches through the feature network."""
    with counting() as count, torch.inference_mode():
        embedder = make_embedder(config)
        count.take()
        embedder(torch.rand(batch, 3, side_px, side_px))
        return count.take()


def embed_texts(config: EmbeddingsConfig, batch: int) -> Count:
    """One batch of texts through the text tower. The tokens of open_clip are zeros, since its tokenizer may need a hub."""
    with counting() as count, torch.inference_mode():
        embedder: Any = make_embedder(config)
        count.take()
        if config.backend == "open_clip":
            embedder.model.encode_text(torch.zeros(batch, embedder.model.context_length, dtype=torch.long))
        else:
            embedder.embed_texts(["a photo"] * batch)
        return count.take()


def encode(shape: BaseShape, side_px: int, batch: int) -> Count:
    """One batch of patches and their mirror images through the VAE's encoder (`latents.encode_both`)."""
    with counting() as count, torch.inference_mode():
        model = make_base(shape)
        count.take()
        images = torch.rand(batch, 3, side_px, side_px)
        moments = [model.codec.moments(to_signed(view)) for view in (images, images.flip(3))]
        psnr_bic(images)
        del moments
        return count.take()


@dataclass(frozen=True)
class FinetuneUnits:
    """Parts of fine-tuning.

    Attributes:
        measured: a step that also measures the gradient norm of each loss term.
        step: any other step.
        forward: the network once, on a batch of samples; ``decode``: one of them decoded.
        trained: numbers that are trained.
    """

    measured: Count
    step: Count
    forward: Count
    decode: Count
    trained: int


class _Trainer(FinetuneTrainer):
    """Trains on one batch of fake tensors."""

    batch: Batch

    def _draw(self, data: Any) -> Batch:
        return self.batch


#: Steps whose samples for L_SR are sampled as in the run; longer runs use the average.
DRAWN_STEPS = 500
#: Which t a batch has does not depend on the patches: one of one number stands for them.
ONE_PATCH = TrainingSet(
    Latents([""], np.zeros(1, np.float32), np.zeros((2, 1, 1, 1, 1), np.float16), None), torch.zeros(1, dtype=torch.long),
    torch.zeros(1, dtype=torch.long),
)  # fmt: skip


@dataclass(frozen=True)
class FinetuneJob:
    """What the cost of fine-tuning depends on.

    Attributes:
        decoder: config of the VAE that L_SR decodes with; None for the base model's own.
        labels: number of pseudo-labels.
        steps: of the whole run.
        sample_batch: images that are sampled at once during training.
    """

    config: FinetuneConfig
    shape: BaseShape
    decoder: Mapping[str, Any] | None
    labels: int
    steps: int
    sample_batch: int

    @property
    def part(self) -> int:
        """Patches of a step in one process."""
        return self.config.batch_size // self.config.processes

    @cached_property
    def drawn(self) -> list[int]:
        """Samples that L_SR sees in each part of each of the first steps, as the run will sample them."""
        config = self.config
        if config.lsr_mode != "target":
            return [self.part // config.accumulate]
        known = min(self.steps, DRAWN_STEPS)
        batches = (
            draw_batch(ONE_PATCH, step=step, size=config.batch_size, null_row=0, label_dropout=config.label_dropout,
                       flip=config.flip, seed=config.seed)
            for step in range(known)
        )  # fmt: skip
        parts = config.accumulate * config.processes
        return [int((t <= config.lsr_last_step).sum()) for batch in batches for t in batch.t.chunk(parts)] or [0]

    @property
    def chance(self) -> float:
        """That L_SR sees a sample."""
        if self.config.lsr_mode == "target" and self.steps > DRAWN_STEPS:
            return (self.config.lsr_last_step + 1) / STEPS
        return sum(self.drawn) / len(self.drawn) / (self.part // self.config.accumulate)

    @property
    def most(self) -> int:
        """Samples that L_SR sees at once, once in the run."""
        accumulate = self.config.accumulate
        if self.steps <= DRAWN_STEPS or self.config.lsr_mode != "target":
            return max(self.drawn)
        return max(*self.drawn, most_at_once(self.part // accumulate, self.chance, self.steps * accumulate))

    @property
    def share(self) -> float:
        """``most`` as a share of a part of the batch."""
        return self.most * self.config.accumulate / self.part

    def of_depth(self, blocks: int) -> FinetuneJob:
        """The same with a network of fewer blocks, as many of which have DiffFit's scales in proportion."""
        dit, config = self.shape.dit, self.config
        scales = round(config.gamma_blocks * blocks / dit.depth)
        shape = replace(self.shape, dit=dit.model_copy(update={"depth": blocks}))
        return replace(self, shape=shape, config=config.model_copy(update={"gamma_blocks": scales}))

    def trainer(self) -> _Trainer:
        """One process of it, on fake tensors."""
        fixed = {"processes": 1, "batch_size": self.part, "compile": False, "class_row_init": "null"}
        decoder = None if self.decoder is None else make_codec(self.decoder)
        labels = {label: label for label in range(self.labels)}
        trainer = _Trainer(make_base(self.shape), self.config.model_copy(update=fixed), labels, decoder=decoder)
        trainer.batch = _batch(self.shape, self.part)
        return trainer


def finetune(job: FinetuneJob) -> FinetuneUnits:
    """Steps with as many samples in L_SR as there are on average; memory for as many as come at once.

    A network of many blocks takes one step; what the rarer steps add is counted on two networks of few blocks, as it grows
    by the same amount with every block.
    """
    depth = job.shape.dit.depth
    if depth <= max(SHALLOW):
        steps = _steps(job)
    else:
        few, more = (_steps(job.of_depth(blocks)) for blocks in SHALLOW)
        at = (depth - SHALLOW[0]) / (SHALLOW[1] - SHALLOW[0])
        steps = Steps(*(mixed(less, greater, at) for less, greater in zip(few, more, strict=True)))
    answers = Answers(distinct=1, share=job.share)
    with counting(answers) as count:
        trainer = job.trainer()
        trainer.step = 1  # measures no gradient norms
        count.take()
        full, peak = _step(trainer, count)
        forward, decode = _sampled(trainer, job.sample_batch, count)
        trained = sum(p.numel() for p in trainer.parameters)
    weight = job.chance / job.share if job.share and job.config.lsr_mode == "target" else 1.0
    rest = steps.least.times(1 - weight)
    step = Count((full.times(weight) + rest).ops, peak)
    return FinetuneUnits(Count(steps.measured.ops, peak), step, forward, decode, trained)


#: Blocks of the networks that rarer steps are counted on.
SHALLOW = (2, 4)


class Steps(NamedTuple):
    """A step that measures gradient norms, and a step without any sample for L_SR."""

    measured: Count
    least: Count


def _steps(job: FinetuneJob) -> Steps:
    answers = Answers(distinct=1, share=job.share)
    with counting(answers) as count:
        trainer = job.trainer()
        count.take()
        measured, _ = _step(trainer, count)
        if job.config.lsr_mode == "target":
            answers.share = 0.0
        least, _ = _step(trainer, count)
        return Steps(measured, least)


def finetune_memory(job: FinetuneJob) -> Count:
    """One step alone, to check whether it fits into memory."""
    with counting(Answers(distinct=1, share=job.share)) as count:
        trainer = job.trainer()
        trainer.step = 1
        count.take()
        step, peak = _step(trainer, count)
        sampled = _sampled(trainer, job.sample_batch, count)
        return Count(step.ops, max(peak, *(part.peak_bytes for part in sampled)))


def _step(trainer: _Trainer, count: Count) -> tuple[Count, int]:
    """One step, and the peak that it has once optimizer and memories hold something."""
    before = count.live_bytes
    trainer.advance(None)  # type: ignore[arg-type]
    taken = count.take()
    return taken, taken.peak_bytes + max(0, taken.live_bytes - before)


def _sampled(trainer: _Trainer, batch: int, count: Count) -> tuple[Count, Count]:
    model, half = trainer.base, trainer.config.precision == "bf16"
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        dit = model.dit.config
        x = torch.randn(batch, dit.in_channels, dit.latent_px, dit.latent_px)
        count.take()
        model.dit(x, torch.zeros(batch), torch.zeros(batch, dtype=torch.long))
        forward = count.take()
        model.decode(x)
        return forward, count.take()


def most_at_once(batch: int, chance: float, steps: int) -> int:
    """The largest number of a batch's samples that L_SR is expected to see at once in a run: binomial, `ONCE` per run."""
    tail = 0.0
    for count in range(batch, 0, -1):
        tail += math.comb(batch, count) * chance**count * (1 - chance) ** (batch - count)
        if tail * steps >= ONCE:
            return count
    return 0


def _batch(shape: BaseShape, size: int) -> Batch:
    latents = (size, shape.dit.in_channels, shape.dit.latent_px, shape.dit.latent_px)
    whole = torch.zeros(size, dtype=torch.long)
    return Batch(
        x0=torch.randn(latents), noise=torch.randn(latents), t=whole, y=whole.clone(), labels=whole.clone(),
        psnr_bic=torch.zeros(size), corner=torch.zeros(size, 2),
    )  # fmt: skip


def checkpointed(config: FinetuneConfig, shape: BaseShape, decoder: Any, machine: Machine) -> FinetuneConfig:
    """The config with checkpointing decided as the machine's free memory would decide it.

    Args:
        decoder: config of the VAE that L_SR decodes with; None for the base model's own.
    """
    free = int(machine.memory_gib * GIB) if machine.device == "cuda" else None
    with counting():
        choice = choose_checkpointing(config, shape.dit, make_codec(decoder or shape.vae), free)
    return config.model_copy(update={"checkpointing": choice})


@dataclass(frozen=True)
class SampleUnits:
    """Parts of sampling: the solver's step with guidance and without, on a batch; one image decoded."""

    guided: Count
    plain: Count
    decode: Count


def sample(config: SampleConfig, shape: BaseShape, batch: int) -> SampleUnits:
    """The network with the adapter folded in."""
    with (
        counting() as count,
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"),
    ):
        model = make_base(shape)
        dit = shape.dit
        x = torch.randn(batch, dit.in_channels, dit.latent_px, dit.latent_px)
        rows = torch.zeros(batch, dtype=torch.long)
        count.take()
        guided(model.dit, rows, config.guidance_scale, config.guided_channels)(x, 0)
        with_guidance = count.take()
        guided(model.dit, rows, 1.0, config.guided_channels)(x, 0)
        without = count.take()
        _decode(model, x[:1], config.decode_tile_px, shape.factor)
        return SampleUnits(with_guidance, without, count.take())


def _decode(model: Any, latent: Tensor, tile_px: int | None, factor: int) -> None:
    if tile_px is None:
        model.decode(latent)
    else:
        side = tile_px // factor
        enlarge(model.decode, latent, scale=factor, tile_px=side, overlap_px=side // 4)


def compare(side_px: int, batch: int) -> Count:
    """One batch of accepted patches as candidates are compared with them, on the CPU."""
    with counting() as count, torch.inference_mode():
        images = torch.rand(batch, 3, side_px, side_px)
        psnr_bic(images)
        nn.functional.interpolate(images, size=(32, 32), mode="area")
        return count.take()


def network_of(recipe: TrainSRConfig) -> nn.Module:
    """A network with random weights."""
    return build_network(recipe.arch, find_architecture(recipe.arch).arguments(recipe.scale, recipe.arch_kwargs)).eval()


def restored(teacher: TrainSRConfig, side_px: int, batch: int) -> Count:
    """One batch of images whose detail the teacher network restores."""
    with counting() as count, torch.inference_mode():
        network = network_of(teacher)
        count.take()
        restore(network, torch.rand(batch, 3, side_px, side_px), 1.0, teacher.scale)
        return count.take()


@dataclass(frozen=True)
class TrainUnits:
    """A step of the first phase of SR training, of the second (the same without a discriminator), and one grid crop."""

    first: Count
    second: Count
    crop: Count
    params: int


def train_sr(config: TrainSRConfig, device: str) -> TrainUnits:
    """Steps of SR training."""
    plan = plan_of(config)
    half = config.precision == "bf16" and (device != "cpu" or find_architecture(config.arch).bf16_on_cpu)
    with counting() as count:
        state = new_state(config.model_copy(update={"compile": False}), "cpu")
        px = plan.lr_patch_px
        lr, hr = (torch.rand(plan.batch_size, 3, side, side) for side in (px, px * config.scale))
        lr, hr = (x.to(memory_format=torch.channels_last) for x in (lr, hr))
        first = _train_step(config, state, lr, hr, half, count)
        second = first
        if state.adversary is not None:
            join_adversary(state, state.adversary)
            state.step = plan.switch
            second = _train_step(config, state, lr, hr, half, count)
        with torch.no_grad():
            state.ema(lr[:1])
        return TrainUnits(first, second, count.take(), sum(p.numel() for p in state.network.parameters()))


def _train_step(config: TrainSRConfig, state: State, lr: Tensor, hr: Tensor, half: bool, count: Count) -> Count:
    count.take()
    before = count.live_bytes
    train_step(config, state, lr, hr, half)
    taken = count.take()
    return Count(taken.ops, taken.peak_bytes + max(0, taken.live_bytes - before))


def evaluate(config: EvaluateConfig, recipe: TrainSRConfig | None, size: tuple[int, int], again: bool) -> Count:
    """One test photo enlarged, by a network or by bicubic (None), and measured.

    Args:
        size: height and width of the HR image.
        again: whether the features of the HR image are known from an earlier evaluation.
    """
    height, width = size
    bicubic = partial(upsample, scale=config.scale)
    evaluator = Evaluator(bicubic, config, "cpu", ReferenceFeatures())  # reads the weights of its metrics
    with counting() as count, torch.inference_mode():
        if recipe is not None:
            evaluator.network = network_of(recipe)
        pixels = np.zeros((height, width, 3), np.uint8)
        image = evaluator.enlarge("", pixels)
        if again:
            evaluator.score(image)
        count.take()
        evaluator.score(evaluator.enlarge("", pixels))
        return count.take()


def invert(config: GSDDConfig, generator: TrainSRConfig, side_px: int, share: int) -> Count:
    """One step of GSDD for a class of ``share`` images (`gsdd.invert`)."""
    with counting() as count:
        network, lr_px = network_of(generator).requires_grad_(False), side_px // generator.scale
        z = torch.rand(share, 3, lr_px, lr_px, requires_grad=True)
        optimizer, corner = torch.optim.Adam([z]), np.zeros(2)
        count.take()
        with torch.no_grad():
            target = features(network, augment(torch.rand(config.batch_real, 3, side_px, side_px), corner, 0)).mean(0)
            if config.regularizer_form == "pairs":
                features(network, augment(torch.rand(share, 3, side_px, side_px), corner, 0))
        mean = features(network, augment(network(z), corner, 0)).mean(0)
        (mean - target).square().mean().backward()
        optimizer.step()
        return count.take()
