"""Stage `train_sr`: train an SR network on a training set. One loop for every network and every training set.

L1 loss, and with `GanConfig` a discriminator in the second phase; Adam; an exponential moving average of the weights,
which is the network that is saved; the published learning rate schedule, scaled to the iterations asked for. Training
sets are compared at equal iterations. A training that is interrupted continues from its last checkpoint and, on a CPU,
ends with the same bytes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddsr_core.config import Runtime
from ddsr_core.errors import TrainingError
from ddsr_core.sr import gan
from ddsr_core.sr.architectures import find_architecture
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.data import Pairs, batches, pack_pairs
from ddsr_core.sr.gan import adversarial_step
from ddsr_core.sr.grids import write_grid
from ddsr_core.sr.optim import descend, ema_decay_at, update_ema
from ddsr_core.sr.plan import plan_of
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

CURVE_ROWS = 200
GRIDS = 10
#: Loss terms in the curves, and what is checked in every step, without a discriminator.
TERMS = ("loss",)
WATCHED = ("L1 loss", "gradient of the L1 loss")


def trunk_input(config: TrainSRConfig) -> dict[str, Source]:
    """The stage's input ``trunk`` if the config asks for a perceptual loss, else no input.

    Raises:
        MissingWeightsError: the weights are missing, or not those of the network that the config demands.
    """
    source = gan.trunk_source(config.gan)
    return {"trunk": source} if source else {}


def run(config: TrainSRConfig, *, data: Path, out: Path, runtime: Runtime, trunk: Path | None = None) -> StageResult:
    """Train on ``data``. Writes the averaged weights, ``model.json``, ``curves.csv``, ``grids/`` and ``summary.json``.

    Args:
        config: network, iterations and recipe.
        data: folder of images, image set, patches artifact, or Parquet.
        out: output folder. The caller keeps ``out/resume`` until the stage has finished.
        runtime: device and progress.
        trunk: weights file of the perceptual loss; located automatically if it is needed and not given.

    Raises:
        ConfigError: unknown network, a network of another scale, or crops that the discriminator cannot take.
        InputError: no image is large enough for a crop, or ``out/resume`` belongs to another training.
        MissingWeightsError: the perceptual trunk is missing, or is not the one that the config demands.
        TrainingError: a loss or gradient is not finite. The last good checkpoint stays in ``out/resume``.
    """
    plan = plan_of(config)
    state = new_state(config, runtime.device, trunk)  # before the images are read: a wrong name fails at once
    pairs = pack_pairs(data, out / RESUME / "pairs", plan.lr_patch_px, config.scale, runtime.progress)
    checkpoint = out / RESUME / "checkpoint.pt"
    if checkpoint.exists():
        load_checkpoint(checkpoint, state, config)
    check_scale(state.ema, config, runtime.device)
    train(config, state, pairs, out, runtime)

    provenance: dict[str, Any] = {"iterations": config.iterations, "seed": config.seed}
    if config.gan and state.adversary:
        provenance |= {"gan": config.gan.recipe, "perceptual": state.adversary.facts}
    kwargs = find_architecture(config.arch).arguments(config.scale, config.arch_kwargs)
    save_weights(out, state.ema, config.arch, kwargs, config.scale, provenance)
    write_curves(out / "curves.csv", state)
    summary = {
        **provenance,
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
    """Run the remaining steps. Checkpoints go to ``out/resume``, grids to ``out/grids``."""
    plan, device, checkpoint = plan_of(config), torch.device(runtime.device), out / RESUME / "checkpoint.pt"
    bf16 = config.precision == "bf16" and (device.type != "cpu" or find_architecture(config.arch).bf16_on_cpu)
    row_every = max(1, config.iterations // CURVE_ROWS)
    grid_every = max(1, config.iterations // GRIDS)
    read_every = 1 if device.type == "cpu" else min(50, row_every)  # reading a number back makes the GPU wait
    unread: list[Tensor] = []
    steps = range(state.step, config.iterations)

    with (
        own_randomness(device),
        runtime.progress(f"Training {config.arch}", total=len(steps) + state.step, unit="steps", done=state.step) as bar,
    ):
        for step, (lr, hr) in zip(steps, batches(pairs, config.seed, steps, plan.batch_size, device), strict=True):
            torch.manual_seed(config.seed * 1_000_003 + step)  # networks with dropout resume exactly
            if state.adversary and step == plan.switch:
                join_adversary(state, state.adversary)
            unread.append(train_step(config, state, lr, hr, bf16))
            state.step, done = step + 1, step + 1 == config.iterations
            row, save = state.step % row_every == 0 or done, state.step % config.checkpoint_every == 0
            grid = state.step % grid_every == 0 or done
            if row or save or grid or state.step % read_every == 0:
                read_back(config, state, unread, checkpoint)
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
    """One step of the current phase, then of the moving average.

    Returns:
        float32 on the device: the values that `WATCHED` names, or `gan.WATCHED` with a discriminator.
    """
    plan = plan_of(config)
    rate = plan.learning_rate_at(state.step)
    if state.adversary and state.step >= plan.switch:
        watched = adversarial_step(state.network, state.optimizer, state.adversary, lr, hr, rate, config.grad_clip, bf16)
        update_ema(state.ema, state.network, ema_decay_at(config.ema_decay, state.step - plan.switch))
        return watched
    with torch.autocast(lr.device.type, torch.bfloat16, enabled=bf16):
        sr = state.network(lr)
    loss = F.l1_loss(sr.float(), hr)
    norm = descend(loss, state.network, state.optimizer, rate, config.grad_clip)
    update_ema(state.ema, state.network, ema_decay_at(config.ema_decay, state.step))
    if state.adversary is None:
        return torch.stack([loss, norm]).detach()
    zero = torch.zeros_like(norm)  # terms of the second phase
    return torch.stack([loss, loss, zero, zero, zero, norm, zero]).detach()


def read_back(config: TrainSRConfig, state: State, unread: list[Tensor], checkpoint: Path) -> None:
    """Read back the watched values of the last steps and check them.

    Raises:
        TrainingError: a value is not finite. The message names the first one and its step.
    """
    names = gan.WATCHED if state.adversary else WATCHED
    first = state.step - len(unread)
    for offset, numbers in enumerate(torch.stack(unread).tolist() if unread else []):
        for name, value in zip(names, numbers, strict=True):
            if not math.isfinite(value):
                raise TrainingError(
                    f"{name} is {value} at step {first + offset + 1} of {config.arch}",
                    where=f"last good checkpoint: {checkpoint if checkpoint.exists() else 'none yet'}",
                    fix="lower learning_rate, or set precision to fp32",
                )
        state.losses.append(numbers[: len(columns(state))])
    unread.clear()


def columns(state: State) -> tuple[str, ...]:
    """Names of the loss terms in the curves."""
    return gan.TERMS if state.adversary else TERMS


def write_curves(path: Path, state: State) -> None:
    """Write ``curves.csv``: step, mean of each loss term since the previous row, learning rate."""
    lines = [",".join(("step", *columns(state), "learning_rate"))]
    for step, means, rate in state.curve:
        lines.append(",".join([str(step), *(f"{mean:.6f}" for mean in means), f"{rate:.3e}"]))
    write_atomically(path, ("\n".join(lines) + "\n").encode())


STAGE = Stage("train_sr", version=2, run=run, config=TrainSRConfig, section="III", on_gpu=True)
