"""Train an SR network on a data set: one loop for every network and every source of data.

L1 loss, then with `GanConfig` a discriminator as well; Adam, an exponential moving average of the weights (the network
that is kept), and the network's published schedule shrunk to the iterations given: sources are compared at an equal
number of iterations. A run that is cut off at any point continues from its last checkpoint and ends with the same bytes
on a CPU.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, JsonValue

from ddsr_core.config import Runtime, StageConfig
from ddsr_core.errors import TrainingError
from ddsr_core.sr import gan
from ddsr_core.sr.architectures import find_architecture
from ddsr_core.sr.gan import GanConfig, adversarial_step
from ddsr_core.sr.optim import descend, ema_decay_at, update_ema
from ddsr_core.sr.recipes import Plan, Schedule, recipe_of
from ddsr_core.sr.state import (
    State,
    check_scale,
    join_adversary,
    load_checkpoint,
    new_state,
    own_randomness,
    save_checkpoint,
)
from ddsr_core.sr.weights import save_weights
from ddsr_core.storage.files import write_atomically, write_json
from ddsr_core.storage.stage import RESUME, Source, Stage, StageResult

if TYPE_CHECKING:
    from torch import Tensor

    from ddsr_core.sr.data import Pairs

CURVE_ROWS = 200
GRIDS = 10
#: Columns of the curves, and what is looked at in each step, when there is no discriminator.
TERMS = ("loss",)
WATCHED = ("L1 loss", "gradient of the L1 loss")


class TrainSRConfig(StageConfig):
    """How an SR network is trained. What is None is as published for the network (`recipes`)."""

    arch: str = Field("srformer-light", description="name of the network, or module:Class")
    arch_kwargs: dict[str, JsonValue] = Field({}, description="arguments of the network that replace its own")
    scale: Literal[4] = Field(4, description="upsampling factor")
    gan: GanConfig | None = Field(None, description="train against a discriminator; None: L1 alone")
    iterations: int = Field(100_000, ge=1, description="optimizer steps, equal for every data source")
    batch_size: int | None = Field(None, ge=1, le=1024, description="crops a step")
    lr_patch_px: int | None = Field(None, ge=4, le=512, description="height and width of the LR crops")
    learning_rate: float | None = Field(None, gt=0, le=1, description="of Adam on L1, at its highest")
    schedule: Schedule | None = Field(
        None, description="cosine to zero, or halved in steps: where published, shrunk to the iterations"
    )
    ema_decay: float = Field(0.999, ge=0, lt=1, description="of the averaged weights, once warm; 0 keeps the last")
    grad_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="of the trunk; last convolution and loss are float32")
    compile: bool = Field(False, description="compile the network first: a minute or more, then faster steps")
    checkpoint_every: int = Field(1000, ge=1, description="steps between checkpoints")
    seed: int = Field(42, ge=0, lt=2**31, description="of weights, crops and flips")

    @property
    def plan(self) -> Plan:
        """The recipe with this config's own values in it."""
        switch, second = self.iterations, None
        if self.gan:
            published = self.gan.published
            batch_size, lr_patch_px, first = published.batch_size, published.lr_patch_px, published.warmup
            switch = round(self.gan.warmup * self.iterations)
            second = published.adversarial
            second = second._replace(learning_rate=self.gan.learning_rate or second.learning_rate)
            second = second._replace(schedule=self.schedule or second.schedule)
        else:
            batch_size, lr_patch_px, first = recipe_of(self.arch)
        first = first._replace(learning_rate=self.learning_rate or first.learning_rate)
        first = first._replace(schedule=self.schedule or first.schedule)
        crops = self.batch_size or batch_size, self.lr_patch_px or lr_patch_px
        return Plan(*crops, first, second, switch, self.iterations)


def trunk_input(config: TrainSRConfig) -> dict[str, Source]:
    """The stage's input ``trunk`` where the config asks for a perceptual loss: its content belongs into the key.

    Raises:
        MissingWeightsError: there is none, or not the one that the config demands.
    """
    source = gan.trunk_source(config.gan)
    return {"trunk": source} if source else {}


def run(config: TrainSRConfig, *, data: Path, out: Path, runtime: Runtime, trunk: Path | None = None) -> StageResult:
    """Train on ``data`` and write the averaged weights, ``model.json``, ``curves.csv``, ``grids/`` and ``summary.json``.

    Args:
        config: network, budget and recipe.
        data: folder of images, photo folder, image set, or patches artifact.
        out: output folder; ``out/resume`` is kept by the caller until the stage is whole.
        runtime: device and progress.
        trunk: file of the perceptual trunk; looked for where it is needed and not given.

    Raises:
        ConfigError: unknown network, or one that does not upscale by ``scale``; crops the discriminator cannot take.
        InputError: no image is large enough for a crop, or ``out/resume`` belongs to another run.
        MissingWeightsError: no perceptual trunk, or not the one that the config demands.
        TrainingError: a loss or gradient that is not finite; the last good checkpoint stays in ``out/resume``.
    """
    from ddsr_core.sr.data import pack_pairs

    plan = config.plan
    state = new_state(config, runtime.device, trunk)  # a wrong name or a missing file should not wait for the images
    pairs = pack_pairs(data, out / RESUME / "pairs", plan.lr_patch_px, config.scale, runtime.progress)
    checkpoint = out / RESUME / "checkpoint.pt"
    if checkpoint.exists():
        load_checkpoint(checkpoint, state, config)
    check_scale(state.ema, config, runtime.device)
    train(config, state, pairs, out, runtime)

    facts: dict[str, Any] = {"iterations": config.iterations, "seed": config.seed}
    if config.gan and state.adversary:
        facts |= {"gan": config.gan.recipe, "perceptual": state.adversary.facts}
    kwargs = {**find_architecture(config.arch).kwargs, **config.arch_kwargs}
    save_weights(out, state.ema, config.arch, kwargs, config.scale, facts)
    write_curves(out / "curves.csv", state)
    summary = {
        **facts,
        "arch": config.arch,
        "params": sum(parameter.numel() for parameter in state.network.parameters()),
        "batch_size": plan.batch_size,
        "lr_patch_px": plan.lr_patch_px,
        "learning_rate": plan.first.learning_rate,
        "schedule": plan.first.schedule,
        "final_loss": round(state.curve[-1][1][0], 6),
        "images": len(pairs),
        "hr_pixels": pairs.hr_pixels,
        "skipped": pairs.skipped,
    }
    write_json(out / "summary.json", summary)
    return StageResult(counts=summary)


def train(config: TrainSRConfig, state: State, pairs: Pairs, out: Path, runtime: Runtime) -> None:
    """Take the steps that are left; checkpoints to ``out/resume``, grids to ``out/grids``."""
    import torch

    from ddsr_core.sr.data import batches
    from ddsr_core.sr.grids import write_grid

    plan, device, checkpoint = config.plan, torch.device(runtime.device), out / RESUME / "checkpoint.pt"
    bf16 = config.precision == "bf16" and (device.type != "cpu" or find_architecture(config.arch).bf16_on_cpu)
    row_every = max(1, config.iterations // CURVE_ROWS)
    grid_every = max(1, config.iterations // GRIDS)
    look_every = 1 if device.type == "cpu" else min(50, row_every)  # looking at a number makes a GPU wait
    unseen: list[Tensor] = []
    steps = range(state.step, config.iterations)

    with (
        own_randomness(device),
        runtime.progress(f"Training {config.arch}", total=len(steps) + state.step, unit="steps", done=state.step) as bar,
    ):
        for step, (lr, hr) in zip(steps, batches(pairs, config.seed, steps, plan.batch_size, device), strict=True):
            torch.manual_seed(config.seed * 1_000_003 + step)  # for networks with dropout, so that they resume
            if state.adversary and step == plan.switch:
                join_adversary(state, state.adversary)
            unseen.append(train_step(config, state, lr, hr, bf16))
            state.step, done = step + 1, step + 1 == config.iterations
            row, save = state.step % row_every == 0 or done, state.step % config.checkpoint_every == 0
            grid = state.step % grid_every == 0 or done
            if row or save or grid or state.step % look_every == 0:
                look(config, state, unseen, checkpoint)
            if row:
                means = [sum(term) / len(state.losses) for term in zip(*state.losses, strict=True)]
                state.curve.append((state.step, means, plan.learning_rate_at(step)))
                state.losses.clear()
                bar.note(f"loss {means[0]:.4f}")
            if grid:
                write_grid(out / f"grids/step-{state.step:06d}.png", state.ema, pairs, config.seed, device)
            if save:
                save_checkpoint(checkpoint, state, config)
            bar.advance()


def train_step(config: TrainSRConfig, state: State, lr: Tensor, hr: Tensor, bf16: bool) -> Tensor:
    """One step of the phase that ``state.step`` lies in, and of the moving average.

    Returns:
        What is watched, float32 on the device: `WATCHED`, or `gan.WATCHED` where there is a discriminator.
    """
    import torch
    import torch.nn.functional as F

    plan, rate = config.plan, config.plan.learning_rate_at(state.step)
    if state.adversary and state.step >= plan.switch:
        networks = state.network, state.optimizer, state.adversary
        watched = adversarial_step(*networks, lr, hr, rate, config.grad_clip, bf16)
        update_ema(state.ema, state.network, ema_decay_at(config.ema_decay, state.step - plan.switch))
        return watched
    with torch.autocast(lr.device.type, torch.bfloat16, enabled=bf16):
        sr = state.network(lr)
    loss = F.l1_loss(sr.float(), hr)
    norm = descend(loss, state.network, state.optimizer, rate, config.grad_clip)
    update_ema(state.ema, state.network, ema_decay_at(config.ema_decay, state.step))
    if state.adversary is None:
        return torch.stack([loss, norm]).detach()
    zero = torch.zeros_like(norm)  # terms that are not in the loss yet
    return torch.stack([loss, loss, zero, zero, zero, norm, zero]).detach()


def look(config: TrainSRConfig, state: State, unseen: list[Tensor], checkpoint: Path) -> None:
    """Bring what is watched of the last steps to the host.

    Raises:
        TrainingError: a number that is not finite, the first one; named with its step.
    """
    import torch

    names = gan.WATCHED if state.adversary else WATCHED
    first = state.step - len(unseen)
    for offset, numbers in enumerate(torch.stack(unseen).tolist() if unseen else []):
        for name, value in zip(names, numbers, strict=True):
            if not math.isfinite(value):
                raise TrainingError(
                    f"{name} is {value} at step {first + offset + 1} of {config.arch}",
                    where=f"last good checkpoint: {checkpoint if checkpoint.exists() else 'none yet'}",
                    fix="lower learning_rate, or set precision to fp32",
                )
        state.losses.append(numbers[: len(columns(state))])
    unseen.clear()


def columns(state: State) -> tuple[str, ...]:
    """Names of the terms in the curves."""
    return gan.TERMS if state.adversary else TERMS


def write_curves(path: Path, state: State) -> None:
    """``curves.csv``: step, learning rate, and the mean of each term since the row before."""
    lines = [",".join(("step", *columns(state), "learning_rate"))]
    for step, means, rate in state.curve:
        lines.append(",".join([str(step), *(f"{mean:.6f}" for mean in means), f"{rate:.3e}"]))
    write_atomically(path, ("\n".join(lines) + "\n").encode())


STAGE = Stage("train_sr", version=2, run=run, config=TrainSRConfig, section="III", on_gpu=True)
