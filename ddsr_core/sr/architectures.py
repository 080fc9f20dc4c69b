"""The SR networks by name. A new network is one file in `archs` and one line in `ARCHITECTURES`.

This module only holds names and numbers, so that a config can be checked without torch; `networks` builds the modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ddsr_core.errors import ConfigError
from ddsr_core.sr import recipes
from ddsr_core.sr.recipes import Recipe

_ARCHS = "ddsr_core.sr.archs"
#: Upsampling factor of the classes in `archs` unless they are told another one.
DEFAULT_SCALE = 4


@dataclass(frozen=True)
class Architecture:
    """A network that can be trained by name. Only ``factory`` is required.

    Attributes:
        factory: ``module:Class``. The class maps ``(B, 3, h, w)`` in [0, 1] to ``(B, 3, scale h, scale w)``.
        kwargs: arguments of the class.
        params: number of trainable parameters at x4.
        recipe: how the network is trained on L1.
        kwargs_of: ``module:function`` that derives the arguments from a state dict under the class's names, or returns
            None if the state dict belongs to another network.
        own_names: ``module:function`` that renames a state dict from any of the network's public names to the class's
            names and passes unknown names through. None if the class uses the public names.
        public_names: ``module:function`` that renames the class's state dict to what other programs open.
        bf16_on_cpu: whether bfloat16 is faster on a CPU. It is slower for the small matrix products of transformers.
        takes_scale: whether the class has an argument ``scale``, 4 by default.
    """

    factory: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    params: int | None = None
    recipe: Recipe = recipes.DEFAULT
    kwargs_of: str | None = None
    own_names: str | None = None
    public_names: str | None = None
    bf16_on_cpu: bool = True
    takes_scale: bool = True

    def arguments(self, scale: int, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the class for an upsampling factor, with ``overrides`` over them."""
        scaled = {"scale": scale} if scale != DEFAULT_SCALE and self.takes_scale else {}
        return {**self.kwargs, **scaled, **overrides}


def _edsr(params: int, recipe: Recipe = recipes.EDSR, **kwargs: Any) -> Architecture:
    m = f"{_ARCHS}.edsr"
    return Architecture(f"{m}:EDSR", kwargs, params, recipe, f"{m}:edsr_kwargs", f"{m}:own_names")


def _rcan(params: int, recipe: Recipe = recipes.RCAN, **kwargs: Any) -> Architecture:
    m = f"{_ARCHS}.rcan"
    return Architecture(f"{m}:RCAN", kwargs, params, recipe, f"{m}:rcan_kwargs", f"{m}:own_names", f"{m}:public_names")


def _rrdbnet(params: int, recipe: Recipe = recipes.RRDBNET, **kwargs: Any) -> Architecture:
    m = f"{_ARCHS}.rrdbnet"
    return Architecture(f"{m}:RRDBNet", kwargs, params, recipe, f"{m}:rrdbnet_kwargs", f"{m}:own_names")


def _srformer(params: int, recipe: Recipe = recipes.SRFORMER, **kwargs: Any) -> Architecture:
    m = f"{_ARCHS}.srformer"
    names = f"{m}:own_names", f"{m}:public_names"
    return Architecture(f"{m}:SRFormer", kwargs, params, recipe, f"{m}:srformer_kwargs", *names, bf16_on_cpu=False)


def _hit_srf(params: int, recipe: Recipe = recipes.HIT_SR, **kwargs: Any) -> Architecture:
    m, names = f"{_ARCHS}.hit_srf", (f"{_ARCHS}.srformer:own_names", f"{_ARCHS}.srformer:with_public_convffn")
    return Architecture(f"{m}:HiTSRF", kwargs, params, recipe, f"{m}:hit_srf_kwargs", *names, bf16_on_cpu=False)


ARCHITECTURES: Mapping[str, Architecture] = {
    "edsr-small": _edsr(232_963, recipes.SMALL, feat=32, blocks=8),
    "edsr": _edsr(1_517_571, feat=64, blocks=16),
    "edsr-l": _edsr(43_089_923, feat=256, blocks=32, res_scale=0.1),
    "rcan-small": _rcan(253_795, recipes.SMALL, feat=32, groups=2, blocks=4, reduction=8),
    "rcan": _rcan(15_592_355, feat=64, groups=10, blocks=20, reduction=16),
    "rrdbnet-small": _rrdbnet(453_955, recipes.SMALL, feat=32, blocks=1, grow=32),
    "rrdbnet": _rrdbnet(16_697_987, feat=64, blocks=23, grow=32),
    "srformer-small": _srformer(77_528, recipes.SMALL, embed=32, depths=[2, 2], heads=[2, 2], window=8),
    "srformer-light": _srformer(872_748, embed=60, depths=[6, 6, 6, 6], heads=[6, 6, 6, 6], window=16),
    "srformer": _srformer(10_543_503, embed=180, depths=[6] * 6, heads=[6] * 6, window=24, head="classical"),
    "hit-srf-small": _hit_srf(142_080, recipes.SMALL, embed=40, heads=[4, 4], window_px=[4, 8, 24]),
    "hit-srf": _hit_srf(866_420, embed=60, heads=[6, 6, 6, 6], window_px=[4, 8, 16, 32, 48, 64]),
}


def find_architecture(name: str) -> Architecture:
    """The architecture of a name in `ARCHITECTURES`, or one made from ``module:Class``.

    Raises:
        ConfigError: unknown name. The message lists the known ones.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    module, _, class_name = name.partition(":")
    if class_name.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return Architecture(factory=name, takes_scale=False)
    raise ConfigError(
        f"unknown architecture {name!r}",
        where="arch",
        fix=f"use one of {', '.join(ARCHITECTURES)}, or module:Class of your own network",
    )
