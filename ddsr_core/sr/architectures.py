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
        own_names: ``module:function`` from a state dict under any of the network's public names to one under the class's
            names; what it does not know passes through. None if the class has the public names.
        public_names: ``module:function`` from the class's state dict to the one that other programs open.
        bf16_on_cpu: whether bfloat16 pays on a CPU; there the small products of transformers get slower.
    """

    factory: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    params: int | None = None
    kwargs_of: str | None = None
    own_names: str | None = None
    public_names: str | None = None
    bf16_on_cpu: bool = True


def _edsr(params: int, **kwargs: Any) -> Architecture:
    return Architecture("ddsr_core.sr.archs.edsr:EDSR", kwargs, params, "ddsr_core.sr.archs.edsr:edsr_kwargs")


def _rcan(params: int, **kwargs: Any) -> Architecture:
    m = "ddsr_core.sr.archs.rcan"
    return Architecture(f"{m}:RCAN", kwargs, params, f"{m}:rcan_kwargs", f"{m}:own_names", f"{m}:public_names")


def _rrdbnet(params: int, **kwargs: Any) -> Architecture:
    m = "ddsr_core.sr.archs.rrdbnet"
    return Architecture(f"{m}:RRDBNet", kwargs, params, f"{m}:rrdbnet_kwargs", f"{m}:own_names")


def _srformer(params: int, **kwargs: Any) -> Architecture:
    m = "ddsr_core.sr.archs.srformer"
    names = f"{m}:own_names", f"{m}:public_names"
    return Architecture(f"{m}:SRFormer", kwargs, params, f"{m}:srformer_kwargs", *names, bf16_on_cpu=False)


def _hit_srf(params: int, **kwargs: Any) -> Architecture:
    m = "ddsr_core.sr.archs.hit_srf"
    names = "ddsr_core.sr.archs.srformer:own_names", "ddsr_core.sr.archs.srformer:with_public_convffn"
    return Architecture(f"{m}:HiTSRF", kwargs, params, f"{m}:hit_srf_kwargs", *names, bf16_on_cpu=False)


ARCHITECTURES: Mapping[str, Architecture] = {
    "edsr-small": _edsr(232_963, feat=32, blocks=8),
    "edsr": _edsr(1_517_571, feat=64, blocks=16),
    "edsr-l": _edsr(43_089_923, feat=256, blocks=32, res_scale=0.1),
    "rcan-small": _rcan(253_795, feat=32, groups=2, blocks=4, reduction=8),
    "rcan": _rcan(15_592_355, feat=64, groups=10, blocks=20, reduction=16),
    "rrdbnet-small": _rrdbnet(453_955, feat=32, blocks=1, grow=32),
    "rrdbnet": _rrdbnet(16_697_987, feat=64, blocks=23, grow=32),
    "srformer-small": _srformer(77_528, embed=32, depths=[2, 2], heads=[2, 2], window=8),
    "srformer-light": _srformer(872_748, embed=60, depths=[6, 6, 6, 6], heads=[6, 6, 6, 6], window=16),
    "hit-srf-small": _hit_srf(142_080, embed=40, heads=[4, 4], window_px=[4, 8, 24]),
    "hit-srf": _hit_srf(866_420, embed=60, heads=[6, 6, 6, 6], window_px=[4, 8, 16, 32, 48, 64]),
}


def find_architecture(name: str) -> Architecture:
    """The architecture of that name, or one made of a ``module:Class`` that can be imported.

    Raises:
        ConfigError: there is none; the message lists the names.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    module, _, class_name = name.partition(":")
    if class_name.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return Architecture(factory=name)
    raise ConfigError(
        f"unknown architecture {name!r}",
        where="arch",
        fix=f"one of {', '.join(ARCHITECTURES)}, or module:Class of a network of your own",
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
        raise ConfigError(f"{arch} is not a torch.nn.Module", where="arch", fix="name a module class as module:Class")
    arguments = {**architecture.kwargs, **(kwargs or {})}
    try:
        return network_class(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{arch} does not take {arguments}: {error}", where="arch_kwargs") from error


def recognize(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of the network that a bare state dict belongs to, told by its keys and shapes.

    The name is the one in `ARCHITECTURES` that is closest: arguments are complete, whatever name they come with.
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
    """A state dict of that architecture, under its own names or public ones, under its own."""
    place = find_architecture(arch).own_names
    return _load(place)(state) if place else state


def public_names(arch: str, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict of that architecture as other programs expect it."""
    place = find_architecture(arch).public_names
    return _load(place)(state) if place else state


def _load(place: str) -> Any:
    module, _, attribute = place.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"cannot import {attribute} from {module}: {error}",
            where="arch",
            fix="check the spelling of module:Class and that the module is on the Python path, "
            "for example PYTHONPATH=. for one in this folder",
        ) from error
