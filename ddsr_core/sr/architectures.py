"""The networks by name. A new one is a file with the module and one line in `ARCHITECTURES`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ddsr_core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """A network that can be trained by name.

    Attributes:
        factory: ``module:Class``; the class maps ``(B, 3, h, w)`` in [0, 1] to ``(B, 3, 4h, 4w)``.
        kwargs: arguments of the class.
        params: number of trainable parameters.
        kwargs_of: ``module:function`` that reads the arguments off a state dict, or says None: not mine.
        bf16_on_cpu: whether bfloat16 pays on a CPU; there the small products of transformers get slower.
    """

    factory: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    params: int | None = None
    kwargs_of: str | None = None
    bf16_on_cpu: bool = True


def _edsr(params: int, **kwargs: Any) -> Architecture:
    return Architecture("ddsr_core.sr.edsr:EDSR", kwargs, params, "ddsr_core.sr.edsr:edsr_kwargs")


def _srformer(params: int, **kwargs: Any) -> Architecture:
    module = "ddsr_core.sr.srformer"
    return Architecture(f"{module}:SRFormer", kwargs, params, f"{module}:srformer_kwargs", bf16_on_cpu=False)


ARCHITECTURES: Mapping[str, Architecture] = {
    "edsr-small": _edsr(232_963, feat=32, blocks=8),
    "edsr": _edsr(1_517_571, feat=64, blocks=16),
    "edsr-l": _edsr(43_089_923, feat=256, blocks=32, res_scale=0.1),
    "srformer-small": _srformer(77_528, embed=32, depths=[2, 2], heads=[2, 2], window=8),
    "srformer-light": _srformer(872_748, embed=60, depths=[6, 6, 6, 6], heads=[6, 6, 6, 6], window=16),
}


def find_architecture(name: str) -> Architecture:
    """The architecture of that name, or one made of a ``module:Class`` that can be imported.

    Raises:
        ConfigError: there is none; the message lists the names.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if ":" in name:
        return Architecture(factory=name)
    raise ConfigError(
        f"unknown architecture {name!r}",
        where="arch",
        mend=f"one of {', '.join(ARCHITECTURES)}, or module:Class of a network of your own",
    )


def build_network(arch: str, kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """A new network with random weights (torch's global generator: seed it around the call).

    Args:
        arch: a name in `ARCHITECTURES` or ``module:Class``.
        kwargs: arguments that take the place of the architecture's own.

    Raises:
        ConfigError: unknown name, nothing to import there, no network, or arguments it does not take.
    """
    from torch import nn

    architecture = find_architecture(arch)
    network_class = _load(architecture.factory)
    if not (isinstance(network_class, type) and issubclass(network_class, nn.Module)):
        raise ConfigError(f"{arch} is not a torch.nn.Module", where="arch", mend="name a module class as module:Class")
    arguments = {**architecture.kwargs, **(kwargs or {})}
    try:
        return network_class(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{arch} does not take {arguments}: {error}", where="arch_kwargs") from error


def recognise(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of the network that a bare state dict belongs to, told by its keys and shapes.

    The name is the one in `ARCHITECTURES` that is closest: arguments are complete, whatever name they come with.
    """
    for name, architecture in ARCHITECTURES.items():
        kwargs = _load(architecture.kwargs_of)(state) if architecture.kwargs_of else None
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


def _load(place: str) -> Any:
    module, _, attribute = place.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"cannot import {attribute} from {module}: {error}",
            where="arch",
            mend="check the spelling of module:Class and that the module is on the Python path",
        ) from error
