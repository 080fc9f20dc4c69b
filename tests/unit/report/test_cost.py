"""What a run cost."""

from pathlib import Path

from ddsr_core.report.cost import cost_of
from ddsr_core.report.record import RunRecord, StageRecord


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


def test_a_run_without_stages_cost_nothing():
    cost = cost_of(RunRecord(name="n", preset="demo"))
    assert (cost.stages, cost.seconds, cost.wall_seconds) == ((), 0, None)
