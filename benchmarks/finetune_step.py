"""Time of one fine-tuning step compared with the same step as the paper's authors code it, on a small model.

    python -m benchmarks.finetune_step [--repeats 9] [--threads 1] [--clock cpu] [--batch-size 4]

Theirs runs in float32, encodes the images in every step, uses unfused attention, averages every parameter of the network,
and updates and averages tensor by tensor; its minimax memories are lists. Ours samples from cached posteriors. Both train
the same parameters of equal networks, with the minimax losses and without L_SR (whose released form has no gradient).
The shapes preserve the proportions of DiT-XL/2 at 512 px: the cost of the VAE's encoder relative to the DiT, the share of
attention, the width of a head. The contestants take turns, so that other load slows all of them.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddsr_core.diffusion.base import Base, BaseInfo
from ddsr_core.diffusion.codec import Codec
from ddsr_core.diffusion.config import FinetuneConfig
from ddsr_core.diffusion.difffit import unfreeze
from ddsr_core.diffusion.dit import DiT, DiTConfig
from ddsr_core.diffusion.finetune_trainer import FinetuneTrainer
from ddsr_core.diffusion.gaussian import STEPS, Schedule, predict_x0, q_sample, simple_and_vb
from ddsr_core.diffusion.latents import Latents
from ddsr_core.diffusion.training_set import TrainingSet

SCALE = 0.18215
LABELS, PATCHES, WARM_UP = 7, 32, 2
PARTS = ("latents", "forward + backward", "optimizer", "EMA", "gradient norms")
#: Contestants; ours by precision of the network.
OURS: dict[str, Literal["bf16", "fp32"]] = {"ddsr, bf16 (default)": "bf16", "ddsr, fp32": "fp32"}
THEIRS = "as the authors do it, fp32"
Clock = Callable[[], float]
Times = dict[str, list[float]]


class Stopwatch:
    """Seconds by part, one entry per step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = self.clock()
        yield
        self.seconds[name].append(self.clock() - started)

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Time every call of ``owner.method``."""
        original = getattr(owner, method)

        def timed(*args: Any, **named: Any) -> Any:
            with self.part(name):
                return original(*args, **named)

        setattr(owner, method, timed)


class AuthorsStep:
    """A training step as `MinimaxDiffusion` codes it: Gu et al., CVPR 2024, whose code the paper's authors build on."""

    def __init__(self, dit: DiT, vae: Any, config: FinetuneConfig, watch: Stopwatch) -> None:
        self.dit, self.vae, self.config, self.watch = dit, vae, config, watch
        self.ema = copy.deepcopy(dit).requires_grad_(False)
        trained = [p for p in dit.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0, foreach=False, fused=False)
        self.schedule = Schedule()
        self.real: dict[int, list[Tensor]] = defaultdict(list)
        self.pseudo: dict[int, list[Tensor]] = defaultdict(list)

    def advance(self, images: Tensor, labels: Tensor) -> float:
        """One step on images ``(B, 3, H, W)`` in [-1, 1]; returns the loss."""
        with self.watch.part("latents"), torch.no_grad():
            x0 = self.vae.encode(images).latent_dist.sample() * SCALE
        t = torch.randint(STEPS, (len(x0),))
        dropped = torch.rand(len(x0)) < self.config.label_dropout
        y = torch.where(dropped, self.dit.config.null_row, labels)
        loss, x0_hat = self.loss(x0, torch.randn_like(x0), t, y, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.remember(x0, x0_hat, labels)
        with self.watch.part("optimizer"):
            self.optimizer.step()
        with self.watch.part("EMA"):
            self.average()
        return loss.item()

    def loss(self, x0: Tensor, noise: Tensor, t: Tensor, y: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """L_simple + vb + λr L_r + λd L_d, and the predicted x0."""
        x_t = q_sample(self.schedule, x0, t, noise)
        with sdpa_kernel(SDPBackend.MATH):
            output = self.dit(x_t, t, y)
        mse, vb = simple_and_vb(self.schedule, output, x0, x_t, t, noise)
        x0_hat = predict_x0(self.schedule, x_t, t, output[:, :4])
        loss, present = (mse + vb).mean(), labels.unique().tolist()
        for label in present:
            mine = x0_hat[labels == label].flatten(1)
            if self.real[label]:
                lowest = self.similarities(mine, self.real[label]).min()
                loss = loss + self.config.lambda_r * (1 - lowest) / len(present)
            if self.pseudo[label]:
                highest = self.similarities(mine, self.pseudo[label]).max()
                loss = loss + self.config.lambda_d * highest / len(present)
        return loss, x0_hat

    @staticmethod
    def similarities(a: Tensor, memory: list[Tensor]) -> Tensor:
        b = torch.stack(memory).flatten(1)
        return (a @ b.T) / (a.norm(dim=1)[:, None] * b.norm(dim=1)[None])

    def remember(self, x0: Tensor, x0_hat: Tensor, labels: Tensor) -> None:
        for memory, latents in ((self.real, x0), (self.pseudo, x0_hat.detach())):
            for latent, label in zip(latents, labels.tolist(), strict=True):
                memory[label].append(latent)
                while len(memory[label]) > self.config.memory_size:
                    memory[label].pop(0)

    @torch.no_grad()
    def average(self) -> None:
        for averaged, current in zip(self.ema.parameters(), self.dit.parameters(), strict=True):
            averaged.mul_(self.config.ema_decay).add_(current, alpha=1 - self.config.ema_decay)


def small_vae() -> Any:
    """Stable Diffusion's VAE, an eighth as wide."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, norm_num_groups=4, latent_channels=4,
    ).requires_grad_(False).eval()  # fmt: skip


def random_dit(shape: DiTConfig) -> DiT:
    """A DiT with random weights. With the usual zero output layer, no gradient would reach the blocks."""
    dit = DiT(shape)
    for parameter in dit.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    return dit.eval()


def cached_posteriors(images: Tensor, vae: Any) -> Latents:
    """The output of the `latents` stage for these images."""
    codec = Codec(vae, (0.0,) * 4, (SCALE,) * 4)
    with torch.no_grad():
        flips = [codec.moments(flip) for flip in (images, images.flip(3))]
    mean, log_variance = (np.stack([np.asarray(moments[index], dtype=np.float16) for moments in flips]) for index in (0, 1))
    names = [str(index) for index in range(len(images))]
    return Latents(names, np.full(len(images), 25.0, np.float32), mean, log_variance)


def make_base(dit: DiT, vae: Any) -> Base:
    info = BaseInfo(
        name="small", image_px=8 * dit.config.latent_px, dit=dit.config.model_dump(), vae_class="AutoencoderKL",
        latent_shift=(0.0,) * 4, latent_scale=(SCALE,) * 4,
    )  # fmt: skip
    return Base(dit, Codec(vae, info.latent_shift, info.latent_scale), info, digest="random", class_names={})


def gflops(function: Callable[[], object]) -> float:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops() / 1e9


def proportion(dit: DiT, vae: Any) -> str:
    """Cost of encoding an image and of the DiT's forward pass, in GFLOP (2 operations per multiply-add)."""
    side = dit.config.latent_px
    row = torch.zeros(1, dtype=torch.long)
    encode = gflops(lambda: vae.encode(torch.zeros(1, 3, 8 * side, 8 * side)))
    forward = gflops(lambda: dit(torch.zeros(1, 4, side, side), row, row))
    return (
        f"One image of {8 * side} px: VAE encode {encode:.2f} GFLOP, DiT forward {forward:.2f} GFLOP, ratio "
        f"{encode / forward:.2f} (SD VAE and DiT-XL/2 at 512 px: 1117, 1049, 1.06)."
    )


def our_run(dit: DiT, vae: Any, config: FinetuneConfig, watch: Stopwatch) -> FinetuneTrainer:
    run = FinetuneTrainer(make_base(copy.deepcopy(dit), vae), config, {label: label for label in range(LABELS)})
    watch.watch(run, "_draw", "latents")
    watch.watch(run.optimizer, "step", "optimizer")
    watch.watch(run, "_average", "EMA")
    return run


def measure(dit: DiT, vae: Any, config: FinetuneConfig, repeats: int, clock: Clock) -> dict[str, Times]:
    """Seconds by contestant, part and "total"; for ours also a step that measures gradient norms, "with norms"."""
    side = 8 * dit.config.latent_px
    images, labels = torch.rand(PATCHES, 3, side, side) * 2 - 1, torch.arange(PATCHES) % LABELS
    data = TrainingSet(cached_posteriors(images, vae), labels, torch.arange(LABELS))
    watches = {who: Stopwatch(clock) for who in (*OURS, THEIRS)}
    runs = {
        who: our_run(dit, vae, config.model_copy(update={"precision": precision}), watches[who])
        for who, precision in OURS.items()
    }
    peer = copy.deepcopy(dit)
    unfreeze(peer, config.gamma_blocks)
    authors = AuthorsStep(peer, vae, config, watches[THEIRS])

    for repeat in range(-WARM_UP, repeats):
        if repeat == 0:
            for watch in watches.values():
                watch.seconds.clear()
        for who, run in runs.items():
            with watches[who].part("total"):
                run.advance(data)
        chosen = torch.randperm(PATCHES)[: config.batch_size]
        batch = images[chosen]
        with watches[THEIRS].part("total"):
            authors.advance(batch, labels[chosen])
    for who, run in runs.items():
        run.step = config.norm_every
        with watches[who].part("with norms"):
            run.advance(data)
    return {who: watch.seconds for who, watch in watches.items()}


def medians(times: Times, norm_every: int) -> dict[str, float]:
    """Milliseconds per step by part. The cost of gradient norms is spread over the steps between two measurements."""
    ms = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    ms["forward + backward"] = ms["total"] - sum(ms[name] for name in ("latents", "optimizer", "EMA"))
    ms["gradient norms"] = (ms["with norms"] - ms["total"]) / norm_every if "with norms" in ms else 0.0
    ms["total"] += ms["gradient norms"]
    return ms


def table(times: dict[str, Times], norm_every: int) -> str:
    """Median milliseconds, and the ratio of their total to each total."""
    columns = {who: medians(seconds, norm_every) for who, seconds in times.items()}
    lines = [f"| part | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for part in (*PARTS, "total"):
        lines.append(f"| {part} | {' | '.join(f'{column[part]:.1f}' for column in columns.values())} |")
    ratios = (f"{columns[THEIRS]['total'] / column['total']:.2f}" for column in columns.values())
    return "\n".join([*lines, f"| theirs / this | {' | '.join(ratios)} |"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="cpu", help="wall: on an idle machine")
    parser.add_argument("--hidden", type=int, default=288, help="a multiple of 72, the width of a head")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--latent-px", type=int, default=32)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = DiTConfig(latent_px=options.latent_px, hidden=options.hidden, depth=options.depth, heads=options.hidden // 72)
    vae, dit = small_vae(), random_dit(shape)
    config = FinetuneConfig(
        batch_size=options.batch_size, lsr_mode="off", minimax_last_step=STEPS - 1, gamma_blocks=options.depth // 2
    )
    print(proportion(dit, vae))
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    times = measure(dit, vae, config, options.repeats, clock)
    print(f"Median ms per step of {options.batch_size} images, {options.threads} threads, {options.clock} time.\n")
    print(table(times, config.norm_every))


if __name__ == "__main__":
    main()
