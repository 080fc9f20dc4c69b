"""Stage `train_sr`: train an SR network on a training set. One loop for every network and every training set.

L1 loss, and with `GanConfig` a discriminator in the second phase; Adam; an exponential moving average of the weights,
which is the network that is saved; the published learning rate schedule, scaled to the requested number of iterations.
Training sets are compared at equal iterations. An interrupted training continues from its last checkpoint and, on a CPU,
ends with the same bytes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddsr_core.config import Runtime
from ddsr_core.distributed import ProcessGroup, run_together
from ddsr_core.errors import ConfigError, TrainingError
from ddsr_core.reporters import Reporter
from ddsr_core.sr import gan
from ddsr_core.sr.architectures import find_architecture
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.data import Pairs, Share, batches, pack_pairs
from ddsr_core.sr.degradation import degrader_of, smallest_px
from ddsr_core.sr.gan import adversarial_step
from ddsr_core.sr.grids import write_grid
from ddsr_core.sr.optim import ONE_PROCESS, descend, ema_decay_at, update_ema
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
from ddsr_core.sr.validation import Validator, curve_csv
from ddsr_core.sr.weights import save_weights, weights_file
from ddsr_core.storage.files import sha256_of, write_atomically, write_json
from ddsr_core.storage.stage import RESUME, Source, Stage, StageResult

CURVE_ROWS = 200
GRIDS = 10
#: In the folder of the unfinished build: digests of the inputs as they were read.
READ = "inputs.json"
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


def run(
    config: TrainSRConfig,
    *,
    data: Path,
    out: Path,
    runtime: Runtime,
    trunk: Path | None = None,
    test: Path | None = None,
    init: Path | None = None,
) -> StageResult:
    """Train on ``data``. Writes the averaged weights, ``model.json``, ``curves.csv``, ``grids/`` and ``summary.json``.

    With ``config.validation`` also ``validation.csv``, pictures in ``validation/``, and the best weights in ``best/``.

    Args:
        config: network, iterations and recipe.
        data: folder of images, image set, patches artifact, or Parquet.
        out: output folder. The caller keeps ``out/resume`` until the stage has finished.
        runtime: device, progress and reporter.
        trunk: weights file of the perceptual loss; located automatically if it is needed and not given.
        test: photos, or pairs, of the validation.
        init: weights file or ``train_sr`` folder that the network starts from; None: random weights.

    Raises:
        ChangedInputError: photos have changed since their digests were computed.
        ConfigError: unknown network, a network of another scale, crops that the discriminator cannot take, or a validation
            without test photos.
        InputError: no image is large enough for a crop, ``init`` does not fit the network, or ``out/resume`` belongs to
            another training.
        MissingWeightsError: the perceptual trunk is missing, or is not the one that the config demands.
        TrainingError: a loss or gradient is not finite. The last good checkpoint stays in ``out/resume``.
    """
    inputs = Inputs(data, trunk, test, init)
    if config.processes == 1:
        train_in_process(ONE_PROCESS, runtime, config=config, inputs=inputs, out=out)
    else:
        check_share(config)
        pairs = packed_pairs(config, data, out, runtime)  # once, before the processes start
        runtime.require_unchanged("data", pairs.source, data)
        work = partial(train_in_process, config=config, inputs=inputs, out=out)
        run_together(work, config.processes, out, runtime)
    read = json.loads((out / RESUME / READ).read_text())
    return StageResult(counts=json.loads((out / "summary.json").read_text()), inputs=read)


@dataclass(frozen=True)
class Inputs:
    """Paths that the stage reads; see `run`."""

    data: Path
    trunk: Path | None
    test: Path | None
    init: Path | None


def packed_pairs(config: TrainSRConfig, data: Path, out: Path, runtime: Runtime) -> Pairs:
    """The training pairs, packed in ``out/resume``."""
    return pack_pairs(data, out / RESUME / "pairs", plan_of(config).lr_patch_px, config.scale, runtime.progress)


def read_inputs(inputs: Inputs, pairs: Pairs, validator: Validator | None, runtime: Runtime) -> dict[str, str]:
    """Digests of what was read.

    Raises:
        ChangedInputError: one of them is not that in the key.
    """
    read = {"data": (pairs.source, inputs.data)}
    if validator:
        read["test"] = validator.digest, validator.test
    if inputs.init:
        read["init"] = sha256_of(weights_file(inputs.init)), inputs.init
    for name, (digest, place) in read.items():
        runtime.require_unchanged(name, digest, place)
    return {name: digest for name, (digest, _) in read.items()}


def train_in_process(group: ProcessGroup, runtime: Runtime, *, config: TrainSRConfig, inputs: Inputs, out: Path) -> None:
    """The entire stage in one of its processes. Process 0 validates and writes."""
    # before the images are read, so that a wrong name fails at once
    state = new_state(config, runtime.device, inputs.trunk, inputs.init)
    validator = new_validator(config, inputs.test, runtime.device)
    pairs = packed_pairs(config, inputs.data, out, runtime)
    read = read_inputs(inputs, pairs, validator, runtime)
    checkpoint = out / RESUME / "checkpoint.pt"
    if checkpoint.exists():
        load_checkpoint(checkpoint, state, config)
    check_scale(state.ema, config, runtime.device)
    check_crops(config)
    train(config, state, pairs, out, runtime, validator, group)
    if group.rank == 0:
        write_outputs(config, state, pairs, validator, out)
        write_json(out / RESUME / READ, read)


def write_outputs(config: TrainSRConfig, state: State, pairs: Pairs, validator: Validator | None, out: Path) -> None:
    """Weights, curves and summary of a finished training."""
    summary = {**provenance(config, state), **training_facts(config, state, pairs)}
    write_network(config, state, out)
    write_curves(out / "curves.csv", state)
    if validator:
        write_atomically(out / "validation.csv", curve_csv(state.validations, validator.config.metrics))
        best = validator.best(state.validations)
        assert best is not None  # the last step is validated
        summary |= {"best_step": best.step, "best": {name: round(value, 5) for name, value in best.values.items()}}
    write_json(out / "summary.json", summary)


def check_share(config: TrainSRConfig) -> None:
    """
    Raises:
        ConfigError: a batch cannot be split into equal parts.
    """
    batch = plan_of(config).batch_size
    if batch % config.processes:
        raise ConfigError(
            f"a batch of {batch} crops cannot be shared equally by {config.processes} processes",
            where="processes",
            fix=f"set batch_size to a multiple of {config.processes}",
        )


def check_crops(config: TrainSRConfig) -> None:
    """
    Raises:
        ConfigError: the crops are too small for the degradation.
    """
    px, smallest = plan_of(config).lr_patch_px, -(-smallest_px(config.scale) // config.scale)
    if config.degradation == "real-esrgan" and px < smallest:
        raise ConfigError(
            f"LR crops of {px} px are too small for the degradation",
            where="lr_patch_px",
            fix=f"set it to {smallest} or more",
        )


def new_validator(config: TrainSRConfig, test: Path | None, device: str) -> Validator | None:
    """The validator of a training, or None if its config has no validation.

    Raises:
        ConfigError: there are no test photos.
    """
    if config.validation is None:
        return None
    if test is None:
        raise ConfigError(
            "a validation needs test photos", where="validation", fix="give a folder of test photos with --test"
        )
    return Validator(config.validation, test, config.scale, device, degrader_of(config.degradation, config.scale, device))


def provenance(config: TrainSRConfig, state: State) -> dict[str, Any]:
    """How the weights were made, for ``model.json``."""
    facts: dict[str, Any] = {"iterations": config.iterations, "seed": config.seed}
    if config.gan and state.adversary:
        facts |= {"gan": config.gan.recipe, "perceptual": state.adversary.facts}
    if state.step < config.iterations:
        facts |= {"steps": state.step}
    return facts


def training_facts(config: TrainSRConfig, state: State, pairs: Pairs) -> dict[str, Any]:
    """The content of ``summary.json`` for a finished training."""
    plan = plan_of(config)
    return {
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


def write_network(config: TrainSRConfig, state: State, folder: Path) -> None:
    """Write the averaged weights."""
    kwargs = find_architecture(config.arch).arguments(config.scale, config.arch_kwargs)
    save_weights(folder, state.ema, config.arch, kwargs, config.scale, provenance(config, state))


class Due(NamedTuple):
    """What is to be done after a step."""

    row: bool
    grid: bool
    validation: bool
    checkpoint: bool


def due_after(config: TrainSRConfig, step: int) -> Due:
    """What is to be done after ``step`` steps."""
    done, validation = step == config.iterations, config.validation
    return Due(
        row=done or step % max(1, config.iterations // CURVE_ROWS) == 0,
        grid=done or step % max(1, config.iterations // GRIDS) == 0,
        validation=validation is not None and (done or step % validation.every == 0),
        checkpoint=step % config.checkpoint_every == 0,
    )


def train(
    config: TrainSRConfig,
    state: State,
    pairs: Pairs,
    out: Path,
    runtime: Runtime,
    validator: Validator | None = None,
    group: ProcessGroup = ONE_PROCESS,
) -> None:
    """Run the remaining steps. Checkpoints go to ``out/resume``, grids to ``out/grids``, the best weights to ``best/``.

    Args:
        group: processes that share the steps. Process 0 validates and writes.
    """
    plan, device, checkpoint = plan_of(config), torch.device(runtime.device), out / RESUME / "checkpoint.pt"
    bf16 = config.precision == "bf16" and (device.type != "cpu" or find_architecture(config.arch).bf16_on_cpu)
    # reading a number back makes the GPU wait
    read_every = 1 if device.type == "cpu" else min(50, max(1, config.iterations // CURVE_ROWS))
    degrade = degrader_of(config.degradation, config.scale, runtime.device)
    unread: list[Tensor] = []
    steps, writes, share = range(state.step, config.iterations), group.rank == 0, Share(group.rank, group.count)

    with (
        own_randomness(device),
        runtime.progress(f"Training {config.arch}", total=len(steps) + state.step, unit="steps", done=state.step) as bar,
        runtime.reporter(f"train_sr-{config.arch}", config.model_dump(mode="json")) as reporter,
    ):
        for step, (lr, hr) in zip(steps, batches(pairs, config.seed, steps, plan.batch_size, device, share), strict=True):
            torch.manual_seed(config.seed * 1_000_003 + step + (group.rank << 48))  # networks with dropout resume exactly
            if state.adversary and step == plan.switch:
                join_adversary(state, state.adversary)
            lr = degrade(hr, (config.seed, step) if writes else (config.seed, step, group.rank)) if degrade else lr
            unread.append(train_step(config, state, lr, hr, bf16, group))
            state.step, due = step + 1, due_after(config, step + 1)
            if any(due) or state.step % read_every == 0:
                read_back(config, state, unread, checkpoint)
            stops = bool(writes and due.validation and validator and validate(config, state, validator, out, reporter))
            if due.validation:
                stops = bool(group.gather(torch.tensor([float(stops)], device=device))[0])  # process 0 decides
            if due.row or stops:
                bar.note(f"loss {add_row(state, plan.learning_rate_at(step), reporter):.4f}")
            if writes and (due.grid or stops):
                grid = out / f"grids/step-{state.step:06d}.png"
                write_grid(grid, state.ema, pairs, config.seed, device)
                reporter.picture("train/grid", grid, state.step)
            if writes and due.checkpoint:
                save_checkpoint(checkpoint, state, config)
            bar.advance()
            if stops:
                break


def add_row(state: State, rate: float, reporter: Reporter) -> float:
    """Add a row to the curve, and report it. Returns the mean loss."""
    means = [sum(term) / len(state.losses) for term in zip(*state.losses, strict=True)]
    state.curve.append((state.step, means, rate))
    state.losses.clear()
    terms = {f"train/{name}": mean for name, mean in zip(columns(state), means, strict=True)}
    reporter.scalars({**terms, "train/learning_rate": rate}, state.step)
    return means[0]


def validate(config: TrainSRConfig, state: State, validator: Validator, out: Path, reporter: Reporter) -> bool:
    """Validate the averaged weights, and write them to ``out/best`` if they are the best so far.

    Returns:
        Whether the training is to stop early.
    """
    picture = out / f"validation/step-{state.step:06d}.png"
    validated = validator.validate(state.ema, state.step, picture)
    if validator.is_better(validated, validator.best(state.validations)):
        write_network(config, state, out / "best")
    state.validations.append(validated)
    reporter.scalars({f"val/{name}": value for name, value in validated.values.items()}, state.step)
    if picture.exists():
        reporter.picture("val/photos", picture, state.step)
    return validator.gives_up(state.validations)


def train_step(
    config: TrainSRConfig, state: State, lr: Tensor, hr: Tensor, bf16: bool, group: ProcessGroup = ONE_PROCESS
) -> Tensor:
    """One step of the current phase, then of the moving average.

    Returns:
        float32 on the device, means over the processes: the values that `WATCHED` names, or `gan.WATCHED` with a
        discriminator.
    """
    watched = _step(config, state, lr, hr, bf16, group)
    group.average_([watched])
    return watched


def _step(config: TrainSRConfig, state: State, lr: Tensor, hr: Tensor, bf16: bool, group: ProcessGroup) -> Tensor:
    plan = plan_of(config)
    rate = plan.learning_rate_at(state.step)
    if state.adversary and state.step >= plan.switch:
        watched = adversarial_step(
            state.network, state.optimizer, state.adversary, lr, hr, rate, config.grad_clip, bf16, group
        )
        update_ema(state.ema, state.network, ema_decay_at(config.ema_decay, state.step - plan.switch))
        return watched
    with torch.autocast(lr.device.type, torch.bfloat16, enabled=bf16):
        sr = state.network(lr)
    loss = F.l1_loss(sr.float(), hr)
    norm = descend(loss, state.network, state.optimizer, rate, config.grad_clip, group)
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


STAGE = Stage(
    "train_sr",
    version=2,
    run=run,
    config=TrainSRConfig,
    section="III",
    on_gpu=True,
    words="{arch}, {iterations:,} iterations",
)
