"""The samplers by name, defined nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema

#: Name -> ``module:function`` with the signature `ddsr_core.diffusion.samplers.Sampler`. A new one is a file in this folder
#: and one line here.
SAMPLERS: Mapping[str, str] = {
    "ancestral": "ddsr_core.diffusion.samplers:ancestral",
    "dpmpp": "ddsr_core.diffusion.samplers:dpmpp",
    "unipc": "ddsr_core.diffusion.samplers:unipc",
}


def known_sampler(name: str) -> str:
    """The name itself.

    Raises:
        ValueError: not a name in `SAMPLERS`.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; use one of {', '.join(SAMPLERS)}")
    return name


#: A name in `SAMPLERS`, as a type of config fields.
SamplerName = Annotated[
    str, AfterValidator(known_sampler), WithJsonSchema({"type": "string", "enum": list(SAMPLERS), "title": "Sampler"})
]
