"""The estimate before a run: quick, and near what a full plan says."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from ddsr_core.pipeline.config import Preset, load_config
from ddsr_core.pipeline.request import RunRequest
from ddsr_core.planning.config import load_machine
from ddsr_core.planning.estimate import Request, plan
from ddsr_core.planning.photos import sampled_sizes
from ddsr_core.planning.quick import ACTIVITIES, SHORT_S, estimate_text, quick_estimate
from ddsr_core.stages import STAGES
from tests.helpers.commands import make_photos

PHOTOS, TESTS = Counter({(480, 640): 12}), Counter({(320, 480): 3})
#: Other numbers than those of the preset, which the estimate has to follow.
OTHER = ("sample.count=28", "sr.archs=['edsr-small']", "sr.training_sets=['distilled']", "sr.train.iterations=500",
         "finetune.steps=200")  # fmt: skip


def test_every_stage_has_a_name_in_estimates():
    assert list(ACTIVITIES) == list(STAGES)


def test_an_estimate_is_near_the_full_plan():
    config = load_config("demo", overrides=OTHER)
    machine = load_machine("cpu")
    found = quick_estimate(config, PHOTOS, TESTS, machine)
    planned = plan(Request(config, PHOTOS, TESTS, machine))
    expected: dict[str, float] = {}
    for stage in planned.stages:
        expected[ACTIVITIES[stage.stage]] = expected.get(ACTIVITIES[stage.stage], 0.0) + stage.seconds
    assert found.unknown == ()
    assert found.patches == next(stage.items for stage in planned.stages if stage.stage == "embeddings")
    assert found.seconds == pytest.approx(expected, rel=0.2, abs=1.0)


@pytest.mark.parametrize("preset", get_args(Preset))
@pytest.mark.parametrize("machine", ["cpu", "rtx4090"])
def test_every_preset_is_estimated_without_counting_operators(preset: Preset, machine: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise AssertionError("an estimate must not count operators")

    monkeypatch.setattr("torch.nn.Module.__call__", refuse)
    found = quick_estimate(load_config(preset), Counter({(768, 1024): 90}), TESTS, load_machine(machine))
    assert found.unknown == ()
    assert min(found.seconds.values()) >= 0
    assert re.match(r"about [\d,]+ patches; .+; about .* in all, on .*, if nothing is in the cache", str(found))
    assert ("To shorten it: --set " in str(found)) == (sum(found.seconds.values()) > SHORT_S)


def test_more_work_takes_longer_and_other_networks_are_not_guessed():
    machine = load_machine("cpu")
    few, many = (quick_estimate(load_config("demo"), Counter({(480, 640): n}), TESTS, machine) for n in (10, 100))
    assert many.seconds["embedding"] == pytest.approx(10 * few.seconds["embedding"], rel=0.01)
    other = quick_estimate(load_config("demo", overrides=["sr.archs=['rcan']"]), PHOTOS, TESTS, machine)
    assert other.unknown == ("SR training", "evaluation")
    assert "without SR training and evaluation, which `ddsr plan` counts" in str(other)


def test_the_sizes_of_many_photos_are_those_of_some(tmp_path: Path):
    photos = make_photos(tmp_path / "photos", 5)
    (photos / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert sampled_sizes(photos, most=2) == {(160, 160): 6}
    assert sampled_sizes(photos) == {(160, 160): 5}


def test_a_gpu_that_was_not_measured_has_no_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ddsr_core.planning.request.resolve_device", lambda device: "cuda")
    request = RunRequest(images=make_photos(tmp_path / "photos", 2), device="cuda")
    assert estimate_text(request, tmp_path) == ("none: this GPU has not been measured; run `ddsr bench`, or name a machine")
