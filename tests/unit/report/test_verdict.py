"""The sentence at the head of a report."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddsr_core.report.data import gather
from ddsr_core.report.record import RunRecord, SrRecord
from ddsr_core.report.verdict import verdict
from tests.helpers.fake_run import PSNR_Y, fake_evaluation, fake_run, noise


def run_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distilled: float, seeds: tuple[int, ...]) -> RunRecord:
    monkeypatch.setitem(PSNR_Y, "distilled", distilled)
    return fake_run(tmp_path / "home", count=14, side=16, seeds=seeds)


@pytest.mark.parametrize(
    ("distilled", "level", "headline"),
    [
        (24.5, "better", "The set is better than as many random crops of the same photos."),
        (23.5, "worse", "The set is worse than as many random crops of the same photos."),
        (24.0, "equal", "No clear difference from as many random crops of the same photos."),
    ],
)
def test_three_seeds_are_judged(tmp_path, monkeypatch, distilled: float, level: str, headline: str):
    judged = verdict(gather(run_with(tmp_path, monkeypatch, distilled, (0, 1, 2))))
    assert (judged.level, judged.headline) == (level, headline)
    assert [item.other for item in judged.comparisons] == ["random", "threshold", "full"]


def test_one_seed_cannot_tell_and_says_what_is_missing(tmp_path, monkeypatch):
    judged = verdict(gather(run_with(tmp_path, monkeypatch, 24.5, (0,))))
    assert judged.level == "unknown"
    assert "1 seed and 6 test photos" in judged.reasons[0]
    assert judged.reasons[0].endswith("A judgment needs at least 3 seeds.")
    assert judged.reasons[1] == "edsr-small: +0.50 dB PSNR-Y."


def test_a_run_without_networks_is_not_judged(tmp_path, monkeypatch):
    run = run_with(tmp_path, monkeypatch, 24.5, (0,))
    assert "No SR network was trained" in verdict(gather(run.model_copy(update={"sr": ()}))).headline
    alone = tuple(record for record in run.sr if record.source in ("distilled", "full"))
    assert "No baseline of the same size" in verdict(gather(run.model_copy(update={"sr": alone}))).headline


def with_restored(run: RunRecord, home: Path, psnr_y: float | None) -> RunRecord:
    """The run with detail restored in its distilled set, and with networks trained on restored random crops."""
    config = {**run.config, "sample": {"detail_restoration": 1.0}}
    records = list(run.sr)
    for seed in (0, 1, 2) if psnr_y is not None else ():
        folder = home / f"restored-{seed}"
        fake_evaluation(folder, noise, psnr_y + seed, 0)
        records.append(
            SrRecord(arch="edsr-small", source="random-restored", budget=14, iterations=400, seed=seed, evaluate_path=folder)
        )
    return run.model_copy(update={"config": config, "sr": tuple(records)})


def test_a_restored_set_is_judged_against_crops_that_the_same_teacher_has_restored(tmp_path, monkeypatch):
    run = with_restored(run_with(tmp_path, monkeypatch, 24.5, (0, 1, 2)), tmp_path, 24.75)
    judged = verdict(gather(run))
    restored = "random crops of the same photos, restored by the same teacher."
    assert (judged.level, judged.headline) == ("worse", f"The set is worse than as many {restored}")
    assert "a teacher SR network, trained on all accepted patches, has replaced their detail" in judged.reasons[0]
    assert "random crops that the same teacher has restored" in judged.reasons[0]
    assert "random-restored" in {item.other for item in judged.comparisons}


def test_without_such_crops_the_verdict_says_what_it_cannot_tell(tmp_path, monkeypatch):
    judged = verdict(gather(with_restored(run_with(tmp_path, monkeypatch, 24.5, (0, 1, 2)), tmp_path, None)))
    assert judged.headline == "The set is better than as many random crops of the same photos."
    assert "a difference may be due to the teacher alone" in judged.reasons[0]
    plain = verdict(gather(run_with(tmp_path / "plain", monkeypatch, 24.5, (0, 1, 2))))
    assert not any("teacher" in reason for reason in plain.reasons)
