"""The sentence at the head of a report."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddsr_core.report.data import gather
from ddsr_core.report.record import RunRecord
from ddsr_core.report.verdict import verdict
from tests.helpers.fake_run import PSNR_Y, fake_run


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
