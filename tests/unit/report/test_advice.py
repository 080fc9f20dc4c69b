"""Notices and next steps."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from ddsr_core.report.advice import next_steps, notices
from ddsr_core.report.data import Quality, Report, gather
from tests.helpers.fake_run import fake_run


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Shared by the tests here: they only read it."""
    run = fake_run(tmp_path_factory.mktemp("home"), count=14, side=16)
    return gather(run.model_copy(update={"name": "cats", "images": "/p/my photos", "test": "/p/test"}))


def with_quality(report: Report, **values: float) -> Report:
    return report.model_copy(update={"quality": Quality(**values)})


def test_an_ordinary_run_has_no_notices_but_for_what_is_wrong_with_it(report: Report):
    assert notices(with_quality(report, own_cluster_share=0.9, psnr_bic_real_mean=20.0)) == [
        "1 of 4 photos were skipped. The reasons are listed under Stages."
    ]


def test_training_photos_that_were_left_out_as_test_photos_are_a_notice(report: Report):
    separated = report.model_copy(update={"run": report.run.model_copy(update={"left_out": 2})})
    assert notices(separated)[0] == "2 training photos are also test photos and are left out of training."


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"own_cluster_share": 0.2}, "Only 20% of the images"),
        ({"psnr_bic_real_mean": 15.0}, "smoother than the accepted patches: PSNR_bic 20.5 dB against 15.0 dB"),
        ({"coverage": 0.2, "coverage_random": 0.3}, "cover the patches worse"),
        ({"refused": 50, "candidates": 100}, "50 of 100 candidates were rejected"),
    ],
)
def test_an_alarming_figure_is_a_notice(report: Report, values: dict[str, float], words: str):
    assert any(words in notice for notice in notices(with_quality(report, **values)))


def test_a_near_copy_and_a_network_below_bicubic_are_notices(report: Report):
    assert report.distilled is not None
    copied = report.model_copy(update={"distilled": report.distilled.model_copy(update={"max_cosine_to_train": 0.97})})
    assert any("close to a copy" in notice for notice in notices(copied))
    bicubic = {**(report.bicubic or {}), "psnr_y": 24.1}
    text = " ".join(notices(report.model_copy(update={"bicubic": bicubic})))
    assert "Worse than bicubic in PSNR-Y: edsr-small on random." in text


def test_next_steps_are_commands_with_their_paths_filled_in(report: Report):
    first, train, upscale = next_steps(report, Path("/h/runs/cats"), "unknown")
    assert shlex.split(first.command) == [
        "ddsr", "distill", "--images", "/p/my photos", "--test", "/p/test", "--config", "/h/runs/cats/config.toml",
        "--set", "sr.seeds=[0, 1, 2]", "--run", "cats-seeds", "--home", "/h",
    ]  # fmt: skip
    assert train.command == "ddsr train-sr --data /h/runs/cats/distilled --arch edsr-small --iterations 20000 --home /h"
    assert upscale.command == "ddsr upscale IN OUT --weights cats:edsr-small/full --home /h"  # it has the highest PSNR-Y
    assert next_steps(report, Path("/h/runs/cats"), "better")[0].command == "ddsr push cats ORG/NAME --home /h"
    assert "sample.count=28" in next_steps(report, Path("/h/runs/cats"), "worse")[0].command


def test_a_run_without_baselines_is_repeated_with_them(report: Report):
    alone = report.model_copy(update={"sr": tuple(r for r in report.sr if r.record.source == "distilled")})
    command = shlex.split(next_steps(alone, Path("/h/runs/cats"), "unknown")[0].command)
    assert 'sr.training_sets=["distilled", "random", "full"]' in command
    assert command.count("--set") == 2
