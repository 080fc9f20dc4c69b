"""Progress as plain lines, and tables of results."""

from __future__ import annotations

import pytest

from flows.cli import console


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, to be set by a test."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_the_rate_of_a_resumed_stage_counts_new_work_alone(clock: list[float], capsys: pytest.CaptureFixture[str]):
    with console._lines("Scoring", total=1000, unit="photos") as bar:
        clock[0] += 0.2
        bar.advance(900)  # from an earlier run
        clock[0] += 20
        bar.advance(40)
    assert "Scoring: 940/1000 photos, 2.0/s, 20.2 s, 30 s left" in capsys.readouterr().err


def test_a_bar_on_a_terminal_forgets_what_an_earlier_run_has_done(clock: list[float]):
    progress = console.Progress(console.TimeRemainingColumn(), get_time=lambda: clock[0], disable=True)
    bar = console._RichBar(progress, progress.add_task("Scoring", total=1000, note="sharp"))
    (task,) = progress.tasks
    for _ in range(9):  # from an earlier run
        clock[0] += 0.02
        bar.advance(100)
    assert task.speed is not None
    assert task.speed > 4000
    for _ in range(3):
        clock[0] += 10
        bar.advance(20)
    assert (task.completed, task.speed, task.time_remaining) == pytest.approx((960, 2.0, 20.0), abs=0.01)
    assert task.fields == {"note": "sharp"}


def test_work_of_a_moment_has_a_rate_too(clock: list[float], capsys: pytest.CaptureFixture[str]):
    with console._lines("Scoring", total=10, unit="photos") as bar:
        clock[0] += 0.5
        bar.advance(10)
        bar.note("quick")
    assert "Scoring: 10/10 photos, 20.0/s, 0.5 s (quick)" in capsys.readouterr().err


def test_results_have_the_default_metrics_and_those_that_were_measured(capsys: pytest.CaptureFixture[str]):
    rows = [
        {"arch": "bicubic", "source": "", "psnr_y": 25.0, "ssim_y": 0.7},
        {"arch": "edsr", "source": "distilled", "label": "distilled + restored", "psnr_y": 26.1234, "dists": 0.25},
    ]
    console.print_results(rows)
    text = capsys.readouterr().out
    assert "distilled + restored" in text
    assert "26.123" in text
    assert "0.2500" in text
    assert "DISTS ↓" in text
    assert "LPIPS-VGG" not in text


def test_brackets_in_names_are_text(capsys):
    rows = [{"arch": "net[old]", "source": "sets[red]/a", "psnr_y": 1.0}, {"arch": "net[/]", "source": "b", "psnr_y": 2.0}]
    console.print_results(rows, title="x[bold]y")
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("net[old]", "sets[red]/a", "net[/]", "x[bold]y"))
