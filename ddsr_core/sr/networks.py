"""Builds networks by name, and recognizes them by their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ddsr_core.errors import ConfigError
from ddsr_core.factories import load_factory
from ddsr_core.sr.architectures import ARCHITECTURES, find_architecture


def build_network(arch: str, kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """A new network with random weights from torch's global generator.

    Args:
        arch: a name in `ARCHITECTURES`, or ``module:Class``.
        kwargs: arguments that override the architecture's own.

    Raises:
        ConfigError: unknown name, nothing to import under it, not a `torch.nn.Module`, or arguments that it rejects.
    """
    architecture = find_architecture(arch)
    network_class = _load(architecture.factory)
    if not (isinstance(network_class, type) and issubclass(network_class, nn.Module)):
        raise ConfigError(f"{arch} is not a torch.nn.Module", where="arch", fix="name a module class as module:Class")
    arguments = {**architecture.kwargs, **(kwargs or {})}
    try:
        return network_class(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{arch} does not take {arguments}: {error}", where="arch_kwargs") from error


def recognize(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of the network that a state dict belongs to, derived from its names and shapes.

    The arguments are complete. The name is the one in `ARCHITECTURES` whose arguments agree, else any of the same class.
    """
    for name, architecture in ARCHITECTURES.items():
        kwargs = _load(architecture.kwargs_of)(own_names(name, state)) if architecture.kwargs_of else None
        if kwargs is None:
            continue
        same = [
            other
            for other, candidate in ARCHITECTURES.items()
            if candidate.factory == architecture.factory
            and all(kwargs.get(key) == value for key, value in candidate.kwargs.items())
        ]
        return (same or [name])[0], kwargs
    return None


def own_names(arch: str, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict of that architecture, renamed from public names to the class's own."""
    place = find_architecture(arch).own_names
    return _load(place)(state) if place else state


def public_names(arch: str, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict of that architecture, renamed to what other programs expect."""
    place = find_architecture(arch).public_names
    return _load(place)(state) if place else state


def _load(place: str) -> Any:
    """Import ``module:attribute`` when it is needed: networks of basicsr take seconds to import."""
    return load_factory(place, "arch")
