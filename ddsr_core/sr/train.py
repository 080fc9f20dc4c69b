"""Train an SR network on a data set: one loop for every network and every source of data.

L1 loss, Adam (0.9, 0.99), an exponential moving average of the weights (the network that is kept), and a schedule that
spans the iterations given: sources are compared at an equal number of iterations. A run that is cut off at any point
continues from its last checkpoint and ends with the same bytes on a CPU.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, JsonValue

from ddsr_core.config import Runtime, StageConfig, canonical_json
from ddsr_core.errors import ConfigError, InputError, TrainingError
from ddsr_core.sr.architectures import build_network, find_architecture
from ddsr_core.sr.weights import readable, save_weights
from ddsr_core.store import RESUME, Stage, StageResult, write_atomically, write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ddsr_core.sr.data import Pairs

CURVE_ROWS = 200


class TrainSRConfig(StageConfig):
    """How an SR network is trained."""

    arch: str = Field("srformer-light", description="name of the network, or module:Class")
    arch_kwargs: dict[str, JsonValue] = Field({}, description="arguments of the network that replace its own")
    scale: Literal[4] = Field(4, description="upsampling factor")
    iterations: int = Field(100_000, ge=1, description="optimiser steps, equal for every data source")
    batch_size: int = Field(16, ge=1, le=1024, description="crops a step")
    lr_patch_px: int = Field(64, ge=4, le=512, description="height and width of the LR crops")
    learning_rate: float = Field(5e-4, gt=0, le=1, description="of Adam, at its highest")
    schedule: Literal["cosine", "step"] = Field(
        "cosine", description="cosine to zero, or halved at 50, 80, 90 and 95 % as in SRFormer's recipe"
    )
    ema_decay: float = Field(0.999, ge=0, lt=1, description="of the averaged weights, once warm; 0 keeps the last")
    grad_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="of the trunk; last convolution and loss are float32")
    checkpoint_every: int = Field(1000, ge=1, description="steps between checkpoints")
    seed: int = Field(42, ge=0, lt=2**31, description="of weights, crops and flips")


@dataclass
class State:
    """Everything that changes while training."""

    network: nn.Module
    ema: nn.Module
    optimiser: torch.optim.Optimizer
    step: int
    curve: list[tuple[int, float, float]]  # (step, mean loss since the row before, learning rate)
    losses: list[float]  # since the last row of the curve


def run(config: TrainSRConfig, *, data: Path, out: Path, runtime: Runtime) -> StageResult:
    """Train on ``data`` and write the averaged weights, ``model.json``, ``curves.csv`` and ``summary.json``.

    Args:
        config: network, budget and recipe.
        data: folder of images, photo folder, image set, or patches artifact.
        out: output folder; ``out/resume`` is kept by the caller until the stage is whole.
        runtime: device and progress.

    Raises:
        ConfigError: unknown network, or one that does not upscale by ``scale``.
        InputError: no image is large enough for a crop, or ``out/resume`` belongs to another run.
        TrainingError: a loss or gradient that is not finite; the last good checkpoint stays in ``out/resume``.
    """
    from ddsr_core.sr.data import pack_pairs

    find_architecture(config.arch)  # a wrong name should not wait for the images
    pairs = pack_pairs(data, out / RESUME / "pairs", config.lr_patch_px, config.scale, runtime.progress)
    checkpoint = out / RESUME / "checkpoint.pt"
    state = new_state(config, runtime.device)
    if checkpoint.exists():
        load_checkpoint(checkpoint, state, config)
    check_scale(state.ema, config, runtime.device)
    train(config, state, pairs, checkpoint, runtime)

    kwargs = {**find_architecture(config.arch).kwargs, **config.arch_kwargs}
    facts = {"iterations": config.iterations, "seed": config.seed}
    save_weights(out, state.ema, config.arch, kwargs, config.scale, facts)
    rows = "".join(f"{step},{loss:.6f},{rate:.3e}\n" for step, loss, rate in state.curve)
    write_atomically(out / "curves.csv", f"step,loss,learning_rate\n{rows}".encode())
    summary = {
        "arch": config.arch,
        "params": sum(parameter.numel() for parameter in state.network.parameters()),
        "iterations": config.iterations,
        "final_loss": round(state.curve[-1][1], 6),
        "images": len(pairs),
        "hr_pixels": pairs.hr_pixels,
        "skipped": pairs.skipped,
    }
    write_json(out / "summary.json", summary)
    return StageResult(counts=summary)


def train(config: TrainSRConfig, state: State, pairs: Pairs, checkpoint: Path, runtime: Runtime) -> None:
    """Take the steps that are left, checkpoint at every ``checkpoint_every``-th."""
    import torch

    device = torch.device(runtime.device)
    bf16 = config.precision == "bf16" and (device.type != "cpu" or find_architecture(config.arch).bf16_on_cpu)
    row_every = max(1, config.iterations // CURVE_ROWS)
    look_every = 1 if device.type == "cpu" else min(50, row_every)  # looking at a number makes a GPU wait
    unseen: list[Tensor] = []

    def look() -> None:
        """Bring losses to the host, and stop at the first that is not finite."""
        first = state.step - len(unseen)
        for offset, (loss, gradient) in enumerate(torch.stack(unseen).tolist() if unseen else []):
            for term, value in (("L1 loss", loss), ("gradient of the L1 loss", gradient)):
                if not math.isfinite(value):
                    raise TrainingError(
                        f"{term} is {value} at step {first + offset + 1} of {config.arch}",
                        where=f"last good checkpoint: {checkpoint if checkpoint.exists() else 'none yet'}",
                        mend="lower learning_rate, or set precision to fp32",
                    )
            state.losses.append(loss)
        unseen.clear()

    title = f"Training {config.arch}"
    with (
        own_randomness(device),
        runtime.progress(title, total=config.iterations, unit="steps", done=state.step) as bar,
    ):
        while state.step < config.iterations:
            torch.manual_seed(config.seed * 1_000_003 + state.step)  # for networks with dropout, so that they resume
            rate = learning_rate_at(config, state.step)
            lr, hr = pairs.batch(config.seed, state.step, config.batch_size, device)
            unseen.append(train_step(config, state, lr, hr, rate, bf16))
            state.step += 1
            row, save = state.step % row_every == 0, state.step % config.checkpoint_every == 0
            if row or save or state.step % look_every == 0 or state.step == config.iterations:
                look()
            if row or state.step == config.iterations:
                loss = sum(state.losses) / len(state.losses)
                state.curve.append((state.step, loss, rate))
                state.losses.clear()
                bar.note(f"loss {loss:.4f}")
            if save:
                save_checkpoint(checkpoint, state, config)
            bar.advance()


def train_step(config: TrainSRConfig, state: State, lr: Tensor, hr: Tensor, rate: float, bf16: bool) -> Tensor:
    """One step of Adam on the L1 loss and of the moving average; ``[loss, gradient norm]`` on the device."""
    import torch
    import torch.nn.functional as F

    with torch.autocast(lr.device.type, torch.bfloat16, enabled=bf16):
        sr = state.network(lr)
    loss = F.l1_loss(sr.float(), hr)
    state.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(state.network.parameters(), config.grad_clip)
    for group in state.optimiser.param_groups:
        group["lr"] = rate
    state.optimiser.step()
    update_ema(state.ema, state.network, ema_decay_at(config.ema_decay, state.step))
    return torch.stack([loss.detach(), norm.detach()])


def learning_rate_at(config: TrainSRConfig, step: int) -> float:
    """Learning rate of a step (counted from 0)."""
    done = step / config.iterations
    if config.schedule == "step":
        return config.learning_rate * 0.5 ** sum(done >= mark for mark in (0.5, 0.8, 0.9, 0.95))
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def ema_decay_at(decay: float, step: int) -> float:
    """``min(decay, (1 + t) / (10 + t))``: short memory at first, so that short runs do not keep their random start."""
    return min(decay, (1 + step) / (10 + step))


def update_ema(ema: nn.Module, network: nn.Module, decay: float) -> None:
    """``ema <- decay * ema + (1 - decay) * network``; buffers are copied."""
    import torch

    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - decay)
        for old, new in zip(ema.buffers(), network.buffers(), strict=True):
            old.copy_(new)


def new_state(config: TrainSRConfig, device: str) -> State:
    """Fresh weights from the seed; the network in channels-last memory."""
    import copy

    import torch

    with own_randomness(torch.device("cpu")):
        torch.manual_seed(config.seed)
        network = build_network(config.arch, config.arch_kwargs)
    network = network.to(device).to(memory_format=torch.channels_last).train()
    ema = copy.deepcopy(network).requires_grad_(False).eval()
    optimiser = torch.optim.Adam(network.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), fused=True)
    return State(network, ema, optimiser, step=0, curve=[], losses=[])


def save_checkpoint(path: Path, state: State, config: TrainSRConfig) -> None:
    """Write the state atomically; readable with ``weights_only``."""
    import torch

    content: dict[str, Any] = {
        "config": canonical_json(config),
        "network": state.network.state_dict(),
        "ema": state.ema.state_dict(),
        "optimiser": state.optimiser.state_dict(),
        "step": state.step,
        "curve": state.curve,
        "losses": state.losses,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path, state: State, config: TrainSRConfig) -> None:
    """Continue ``state`` from a checkpoint.

    Raises:
        InputError: it is unreadable, or of another config.
    """
    import torch

    mend = f"remove {path.parent} to train from the start"
    with readable(path, mend):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if content["config"] != canonical_json(config):
        raise InputError("the checkpoint belongs to a run with another config", where=path, mend=mend)
    state.network.load_state_dict(content["network"])
    state.ema.load_state_dict(content["ema"])
    state.optimiser.load_state_dict(content["optimiser"])
    state.step, state.curve, state.losses = content["step"], content["curve"], content["losses"]


def check_scale(network: nn.Module, config: TrainSRConfig, device: str) -> None:
    """Raise a ConfigError unless the network maps ``(1, 3, p, p)`` to ``(1, 3, scale p, scale p)``."""
    import torch

    px = config.lr_patch_px
    with torch.no_grad(), own_randomness(torch.device(device)):
        shape = tuple(network(torch.zeros(1, 3, px, px, device=device)).shape)
    wanted = (1, 3, px * config.scale, px * config.scale)
    if shape != wanted:
        raise ConfigError(
            f"{config.arch} turns 1x3x{px}x{px} into {'x'.join(map(str, shape))}, not {'x'.join(map(str, wanted))}",
            where="arch",
            mend=f"name a network that upscales by {config.scale}",
        )


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Networks draw from torch's global generator: leave the caller's as it was."""
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


STAGE = Stage("train-sr", version=1, run=run)
