"""Everything that changes while an SR network is trained, and its checkpoint."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddsr_core.config import canonical_json
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.sr.architectures import find_architecture
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.gan import Adversary, new_adversary
from ddsr_core.sr.networks import build_network
from ddsr_core.sr.optim import new_adam
from ddsr_core.sr.plan import plan_of
from ddsr_core.sr.validation import Validated
from ddsr_core.sr.weights import load_into
from ddsr_core.storage.files import write_atomically
from ddsr_core.storage.weights_file import readable


@dataclass
class State:
    """Everything that changes while training.

    Attributes:
        network: in training mode, channels-last.
        ema: moving average of ``network``, in evaluation mode.
        optimizer: of ``network``.
        adversary: discriminator and losses of an adversarial training.
        step: number of steps done.
        curve: rows of (step, mean of each loss term since the previous row, learning rate).
        losses: loss terms of each step since the last row of ``curve``.
        validations: validations so far.
    """

    network: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    adversary: Adversary | None = None
    step: int = 0
    curve: list[tuple[int, list[float], float]] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    validations: list[Validated] = field(default_factory=list)


def new_state(config: TrainSRConfig, device: str, trunk: Path | None = None, init: Path | None = None) -> State:
    """The state before the first step, with given weights, or random weights from the config's seed.

    Args:
        config: network and recipe.
        device: torch device of the networks.
        trunk: weights file of the perceptual loss, for an adversarial training.
        init: weights file or ``train_sr`` folder that the network starts from.

    Raises:
        ConfigError: unknown network, or crops that the discriminator cannot take.
        MissingWeightsError: the perceptual trunk is missing.
        InputError: the perceptual trunk or the initial weights cannot be used.
    """
    plan = plan_of(config)
    with own_randomness(torch.device("cpu")):
        torch.manual_seed(config.seed)
        network = build_network(config.arch, find_architecture(config.arch).arguments(config.scale, config.arch_kwargs))
        adversary = new_adversary(config.gan, plan.lr_patch_px, config.scale, trunk, device) if config.gan else None
    if init is not None:
        load_into(network, config.arch, init)
    network = network.to(device).to(memory_format=torch.channels_last).train()
    ema = copy.deepcopy(network).requires_grad_(False).eval()
    if config.compile:
        network.compile()
    return State(network, ema, new_adam(network, plan.first.learning_rate), adversary)


def join_adversary(state: State, adversary: Adversary) -> None:
    """Begin the second phase: from the averaged weights of the first, with a new optimizer."""
    state.network.load_state_dict(state.ema.state_dict())
    state.optimizer = new_adam(state.network, adversary.recipe.adversarial.learning_rate, adversary.recipe.beta2)


def save_checkpoint(path: Path, state: State, config: TrainSRConfig) -> None:
    """Write the state atomically, as a file that ``torch.load(weights_only=True)`` reads."""
    content: dict[str, Any] = {
        "config": canonical_json(config),
        "network": state.network.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "step": state.step,
        "curve": state.curve,
        "losses": state.losses,
        "validations": [(item.step, dict(item.values)) for item in state.validations],
    }
    if state.adversary:
        content["discriminator"] = state.adversary.discriminator.state_dict()
        content["discriminator_optimizer"] = state.adversary.optimizer.state_dict()
        content["perceptual"] = state.adversary.facts
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path, state: State, config: TrainSRConfig) -> None:
    """Load a checkpoint into ``state``.

    Raises:
        InputError: the file cannot be read, or belongs to a training with another config or perceptual trunk.
    """
    fix = f"remove {path.parent} to train from the start"
    with readable(path, fix):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if content["config"] != canonical_json(config):
        raise InputError("the checkpoint belongs to a run with another config", where=path, fix=fix)
    adversary = state.adversary
    if adversary and content["perceptual"] != adversary.facts:
        source = content["perceptual"]["source"]
        raise InputError(f"the checkpoint belongs to a run with another perceptual trunk: {source}", where=path, fix=fix)
    if adversary and content["step"] > plan_of(config).switch:
        join_adversary(state, adversary)  # makes the optimizer; the weights are loaded below
    state.network.load_state_dict(content["network"])
    state.ema.load_state_dict(content["ema"])
    state.optimizer.load_state_dict(content["optimizer"])
    if adversary:
        adversary.discriminator.load_state_dict(content["discriminator"])
        adversary.optimizer.load_state_dict(content["discriminator_optimizer"])
    state.step, state.curve, state.losses = content["step"], content["curve"], content["losses"]
    state.validations = [Validated(*item) for item in content["validations"]]


def check_scale(network: nn.Module, config: TrainSRConfig, device: str) -> None:
    """Raise a ConfigError unless the network maps ``(1, 3, p, p)`` to ``(1, 3, scale p, scale p)``."""
    px = plan_of(config).lr_patch_px
    with torch.no_grad(), own_randomness(torch.device(device)):
        shape = tuple(network(torch.zeros(1, 3, px, px, device=device)).shape)
    wanted = (1, 3, px * config.scale, px * config.scale)
    if shape != wanted:
        raise ConfigError(
            f"{config.arch} turns 1x3x{px}x{px} into {'x'.join(map(str, shape))}, not {'x'.join(map(str, wanted))}",
            where="arch",
            fix=f"choose a network that upscales by {config.scale}",
        )


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Restore torch's global generators afterwards: networks draw their weights and dropout from them."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
