"""What a run cost."""

import json
from pathlib import Path

from ddsr_core.config import Runtime, digest_of
from ddsr_core.report.cost import cost_of
from ddsr_core.report.record import RunRecord, StageRecord
from ddsr_core.storage.store import Store
from tests.helpers.toy_stage import TOY, CountConfig, inputs


def stage(name: str, key: str, seconds: float, cached: bool) -> StageRecord:
    return StageRecord(name=name, key=key, seconds=seconds, cached=cached, path=Path("nowhere"))


def test_stages_are_added_up_by_name_and_an_artifact_counts_once():
    stages = (
        stage("patches", "a", 10, True), stage("train_sr (edsr random)", "b", 20, False),
        stage("train_sr (edsr full)", "c", 30, False), stage("train_sr (edsr full)", "c", 30, False),
    )  # fmt: skip
    run = RunRecord(
        name="n", preset="demo", stages=stages, started="2026-01-01T00:00:00+00:00", finished="2026-01-01T00:01:05+00:00"
    )
    cost = cost_of(run)
    assert [(s.name, s.seconds, s.builds, s.cached) for s in cost.stages] == [("train_sr", 50, 2, 0), ("patches", 10, 1, 1)]
    assert [round(s.share, 3) for s in cost.stages] == [0.833, 0.167]
    assert (cost.seconds, cost.built_seconds, cost.gpu_seconds, cost.wall_seconds) == (60, 50, 0, 65)


def test_the_training_of_the_teacher_is_counted_and_named():
    stages = (stage("train_sr (teacher)", "a", 40, False), stage("train_sr (edsr random)", "b", 20, False))
    cost = cost_of(RunRecord(name="n", preset="demo", stages=stages))
    assert [(s.name, s.seconds) for s in cost.stages] == [("teacher", 40), ("train_sr", 20)]
    assert cost.seconds == 60


def test_a_run_without_stages_cost_nothing():
    cost = cost_of(RunRecord(name="n", preset="demo"))
    assert (cost.stages, cost.seconds, cost.wall_seconds) == ((), 0, None)


def test_cpu_time_and_memory_come_from_the_manifests(tmp_path: Path):
    source = tmp_path / "log"
    source.touch()
    store = Store(tmp_path / "home")
    made = [store.build(TOY, CountConfig(files=count), inputs(source), Runtime())[0] for count in (1, 2)]
    stages = tuple(
        StageRecord(name="toy", key=item.key, seconds=item.manifest.seconds, cached=False, path=item.path) for item in made
    )
    cost = cost_of(RunRecord(name="n", preset="demo", stages=stages))
    assert cost.cpu_seconds == sum(item.manifest.cpu_seconds or 0 for item in made) or cost.cpu_seconds is None
    assert cost.peak_bytes is not None
    assert cost.peak_bytes > 10_000_000  # a Python process
    assert cost.devices == ("cpu",)


def test_a_manifest_without_costs_is_still_whole(tmp_path: Path):
    source = tmp_path / "log"
    source.touch()
    store = Store(tmp_path / "home")
    artifact, _ = store.build(TOY, CountConfig(files=1), inputs(source), Runtime())
    values = artifact.manifest.model_dump(mode="json", exclude={"cpu_seconds", "peak_bytes", "check"})
    earlier = {**values, "check": digest_of(values)}  # as an earlier version wrote it
    (artifact.path / "manifest.json").write_text(json.dumps(earlier))
    assert Store(tmp_path / "home").find("toy", artifact.key) is not None
