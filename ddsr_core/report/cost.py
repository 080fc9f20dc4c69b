"""What a run cost: seconds, devices and bytes, stage by stage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from ddsr_core.report.record import RunRecord, StageRecord
from ddsr_core.storage.stage import Manifest, read_manifest

#: Label of the training of the SR network that ranks candidates and restores detail.
TEACHER = "teacher"


@dataclass(frozen=True)
class StageCost:
    """One stage, or all builds of one stage.

    Attributes:
        seconds: of the builds, whenever they were made.
        share: of the seconds of the whole run, 0 to 1.
        devices: that it was built on.
        bytes: of its artifacts.
        cached: how many of the builds this run found in the cache.
        builds: how many artifacts it has.
        cpu_seconds: CPU time of the builds; None if it was not recorded.
    """

    name: str
    seconds: float
    share: float
    devices: tuple[str, ...]
    bytes: int
    cached: int
    builds: int
    cpu_seconds: float | None = None


@dataclass(frozen=True)
class Cost:
    """The cost of a run.

    Attributes:
        stages: the most expensive first.
        seconds: of all builds, whenever they were made.
        gpu_seconds: of those built on a GPU.
        built_seconds: of those that this run built itself.
        wall_seconds: from the start to the end of the run; None if it is not known.
        bytes: of all artifacts.
        cpu_seconds: CPU time of all builds; None if it was not recorded.
        peak_bytes: largest memory that a building process has used; None if it was not recorded.
    """

    stages: tuple[StageCost, ...]
    seconds: float
    gpu_seconds: float
    built_seconds: float
    wall_seconds: float | None
    bytes: int
    cpu_seconds: float | None = None
    peak_bytes: int | None = None

    @property
    def devices(self) -> tuple[str, ...]:
        """Every device that a stage was built on."""
        return tuple(dict.fromkeys(device for stage in self.stages for device in stage.devices))


def cost_of(run: RunRecord) -> Cost:
    """Add up the stages of a run; an artifact that was used several times counts once."""
    records = list({record.key: record for record in run.stages}.values())
    manifests = {record.key: read_manifest(record.path) for record in records}
    total = sum(record.seconds for record in records)
    names = dict.fromkeys(map(stage_name, records))
    stages = [_stage_cost(name, records, manifests, total) for name in names]
    return Cost(
        stages=tuple(sorted(stages, key=lambda stage: -stage.seconds)),
        seconds=total,
        gpu_seconds=sum(r.seconds for r in records if (m := manifests[r.key]) and m.device.startswith("cuda")),
        built_seconds=sum(record.seconds for record in records if not record.cached),
        wall_seconds=_wall(run),
        bytes=sum(stage.bytes for stage in stages),
        cpu_seconds=_sum(m.cpu_seconds for m in manifests.values() if m),
        peak_bytes=max((m.peak_bytes for m in manifests.values() if m and m.peak_bytes), default=None),
    )


def stage_name(record: StageRecord) -> str:
    """The stage of a record. The training of the teacher counts apart from that of the networks which are compared.

    >>> stage_name(StageRecord(name="train_sr (teacher)", key="", seconds=1, cached=False, path=""))
    'teacher'
    """
    name, _, label = record.name.partition(" (")
    return TEACHER if label == f"{TEACHER})" else name


def _stage_cost(name: str, records: Iterable[StageRecord], manifests: dict[str, Manifest | None], total: float) -> StageCost:
    own = [record for record in records if stage_name(record) == name]
    built = [manifest for record in own if (manifest := manifests[record.key]) is not None]
    seconds = sum(record.seconds for record in own)
    return StageCost(
        name=name,
        seconds=seconds,
        share=seconds / total if total else 0.0,
        devices=tuple(dict.fromkeys(manifest.device for manifest in built)),
        bytes=sum(manifest.bytes for manifest in built),
        cached=sum(record.cached for record in own),
        builds=len(own),
        cpu_seconds=_sum(manifest.cpu_seconds for manifest in built),
    )


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _wall(run: RunRecord) -> float | None:
    if run.started is None or run.finished is None:
        return None
    return (datetime.fromisoformat(run.finished) - datetime.fromisoformat(run.started)).total_seconds()
