"""Rates of the machine that a run is planned for, and the machines that ship with the package."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ddsr_core.errors import ConfigError

#: Where a rate comes from. ``estimated`` peaks are published ones, of which a share is taken.
Origin = Literal["measured", "published x estimated share", "estimated"]
MACHINES = Path(__file__).with_name("machines.toml")


class Rates(BaseModel):
    """How fast a device computes. An operator takes its arithmetic, its memory traffic, and its launch.

    ``_half``: in bfloat16 with float32 sums.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    matmul: float = Field(gt=0, description="Matrix products in float32, FLOP/s.")
    matmul_half: float = Field(gt=0, description="Matrix products in bfloat16, FLOP/s.")
    conv: float = Field(gt=0, description="Convolutions in float32, FLOP/s.")
    conv_half: float = Field(gt=0, description="Convolutions in bfloat16, FLOP/s.")
    attention: float = Field(gt=0, description="Fused attention in float32, FLOP/s.")
    attention_half: float = Field(gt=0, description="Fused attention in bfloat16, FLOP/s.")
    bandwidth: float = Field(gt=0, description="Memory traffic of element-wise operators, bytes/s.")
    launch: float = Field(ge=0, description="Fixed cost of one operator, s.")


class HostRates(BaseModel):
    """How fast one processor core handles images, and how many cores there are."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    cores: int = Field(8, ge=1, description="Cores that decode, score and encode images at once.")
    jpeg_decode: float = Field(gt=0, description="Decoded photos, megapixels/s per core.")
    score: float = Field(gt=0, description="PSNR_bic of all windows, megapixels/s per core.")
    png_encode: float = Field(gt=0, description="Encoded PNG, megapixels/s per core.")
    png_decode: float = Field(gt=0, description="Decoded PNG, megapixels/s per core.")
    kmeans: float = Field(gt=0, description="k-means, FLOP/s on one core.")


class Machine(BaseModel):
    """A device, its host, and where their rates come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    device: Literal["cuda", "cpu"]
    memory_gib: float = Field(gt=0, description="Memory of the device; of the machine for device=cpu, GiB.")
    host_memory_gib: float | None = Field(None, gt=0, description="Memory of the host, GiB. None: not checked.")
    origin: Origin
    note: str = Field("", description="How the rates were obtained.")
    rates: Rates
    host: HostRates
    host_origin: Origin = "measured"


def machine_names() -> list[str]:
    """Machines whose rates ship with the package."""
    return sorted(_shipped())


def load_machine(name_or_file: str) -> Machine:
    """A machine of the package by its name, or from a TOML file such as ``ddsr bench`` writes.

    Raises:
        ConfigError: no such name or file, or the file is not a machine.
    """
    shipped = _shipped()
    if name_or_file in shipped:
        return shipped[name_or_file]
    path = Path(name_or_file).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"no machine {name_or_file!r}", where="--gpu",
            fix=f"choose one of: {', '.join(shipped)}, or a file that `ddsr bench` has written",
        )  # fmt: skip
    return read_machine(path)


def read_machine(path: Path) -> Machine:
    """A machine from its TOML file.

    Raises:
        ConfigError: the file is not a machine.
    """
    try:
        return Machine.model_validate(tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise ConfigError(f"not a table of rates: {error}", where=path, fix="run `ddsr bench` again") from error


def _shipped() -> dict[str, Machine]:
    return {name: Machine.model_validate(values) for name, values in tomllib.loads(MACHINES.read_text()).items()}
