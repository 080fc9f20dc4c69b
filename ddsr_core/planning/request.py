"""The request for a plan, from the command line or the Prefect form, and how a plan is shown."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ddsr_core.config import resolve_device
from ddsr_core.errors import ConfigError
from ddsr_core.imaging.hold_out import TEST_SHARE
from ddsr_core.pipeline.config import PipelineConfig
from ddsr_core.planning.bench import measured_machine
from ddsr_core.planning.config import Machine, load_machine
from ddsr_core.planning.estimate import Plan, Request, StagePlan, plan
from ddsr_core.planning.photos import hold_out_sizes, parse_sizes, sizes_of_photos
from ddsr_core.planning.work import Sizes

#: Without a GPU named and without rates of this machine.
DEFAULT_MACHINE = "cpu"


class PlanRequest(BaseModel):
    """The request for a plan of one run. Only the sizes of photos are read, and weights need not be on this machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    config: PipelineConfig
    images: Path | None = Field(None, description="Training photos. Without them, give their sizes.")
    sizes: str | None = Field(
        None, description="Number and size of photos that are not on this machine, such as 10000@1280x960."
    )
    test: Path | None = Field(None, description="Test photos. Without them, one photo in ten is held out.")
    gpu: str | None = Field(None, description="A machine that ships with the package, or a file of `ddsr bench`.")
    price: float | None = Field(None, ge=0, description="Price of that machine per hour, in any currency.")
    accepted: float = Field(
        0.5, gt=0, le=1, description="Share of the windows that patches.threshold_db is assumed to accept, 0 to 1."
    )


def plan_of(request: PlanRequest, home: Path, device: str = "auto") -> Plan:
    """Plan a run.

    Args:
        home: where ``ddsr bench`` has stored the rates of this machine.
        device: of this machine, where no other one is named.

    Raises:
        ConfigError: neither photos nor sizes, an unknown machine, or a model whose shape is not known.
        InputError: no photos.
    """
    photos = _photos(request)
    if request.test is not None:
        tests = sizes_of_photos(request.test)[0]
    elif request.config.sr.archs:
        photos, tests = hold_out_sizes(photos, TEST_SHARE)
    else:
        tests = Counter()
    machine = machine_of(request.gpu, home, device)
    return plan(Request(request.config, photos, tests, machine, request.price, request.accepted))


def _photos(request: PlanRequest) -> Sizes:
    if (request.images is None) == (request.sizes is None):
        raise ConfigError("a plan needs photos or their sizes", where="--images", fix="set either --images or --sizes")
    return parse_sizes(request.sizes) if request.sizes else sizes_of_photos(request.images or Path())[0]


def machine_of(gpu: str | None, home: Path, device: str) -> Machine:
    """The machine that is named, or else this one: as measured by ``ddsr bench``, or a processor core that ships.

    Raises:
        ConfigError: no such machine; or none named, and this one's GPU has not been measured.
    """
    if gpu is not None:
        return load_machine(gpu)
    kind = resolve_device(device)
    machine = measured_machine(home, kind)
    if machine is None and kind != "cpu":
        raise ConfigError("this GPU has not been measured", where="--gpu", fix="run `ddsr bench`, or name a machine")
    return machine or load_machine(DEFAULT_MACHINE)


def row_of(stage: StagePlan) -> dict[str, Any]:
    """One stage as a row of a table: texts with their units."""
    row = {
        "stage": stage.label if stage.label == stage.stage else f"{stage.stage} {stage.label}",
        "items": f"{stage.items:,} {stage.unit}",
        "TFLOP": f"{stage.tflop:,.3g}" if stage.tflop < 1000 else f"{stage.tflop:,.0f}",
        "device GiB": f"{stage.device_gib:.1f}" if stage.device_gib else "-",
        "host GiB": f"{stage.host_gib:.1f}",
        "disk GiB": f"{stage.disk_gib:.2f}",
        "time": duration(stage.seconds),
        "fits": "yes" if stage.fits else f"NO; --set {stage.remedy}" if stage.remedy else "NO",
    }
    return row if stage.cost is None else {**row, "cost": f"{stage.cost:.2f}"}


def duration(seconds: float) -> str:
    """
    >>> duration(42), duration(5400), duration(200_000)
    ('42 s', '1.5 h', '2.3 d')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200 / 2:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} d"


def summary_of(planned: Plan) -> str:
    """The sum, where the rates come from, and what does not fit, in a few lines."""
    cost = "" if planned.cost is None else f", cost {planned.cost:.2f}"
    lines = [
        f"In all: {duration(planned.seconds)}{cost}, {planned.disk_gib:.1f} GiB of disk, on {planned.machine}.",
        f"Rates: {planned.rates}.",
        *(f"Assumed: {text}." for text in planned.assumptions),
        *(f"Not counted: {stage.uncounted} ({stage.label})." for stage in planned.stages if stage.uncounted),
    ]
    misfit = planned.first_misfit
    if misfit is None:
        lines.append("Every stage fits into memory.")
    elif misfit.remedy:
        lines.append(f"{misfit.label} does not fit into memory; it does with --set {misfit.remedy}.")
    else:
        lines.append(f"{misfit.label} does not fit into memory, and no single field makes it fit.")
    return "\n".join(lines)
