"""Networks trained and measured by themselves are named runs that gc spares."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ddsr_core.errors import ConfigError, InputError
from ddsr_core.gc import collect_garbage
from ddsr_core.imaging.photos import photo_source
from ddsr_core.pipeline.plain import plain_backend
from ddsr_core.pipeline.run_folder import list_runs, read_run
from ddsr_core.pipeline.run_state import read_record
from ddsr_core.pipeline.step_runs import EvaluateRequest, TrainRequest, run_evaluation, run_training
from ddsr_core.sr.config import ValidationConfig
from ddsr_core.storage.store import Store
from flows.evaluate import evaluate
from flows.train_sr import train_sr
from tests.helpers.commands import make_photos

QUICK = ("batch_size=2", "lr_patch_px=8")


@pytest.mark.parametrize(("flow", "request_class"), [(train_sr, TrainRequest), (evaluate, EvaluateRequest)])
def test_a_form_has_the_defaults_of_the_command(flow: Any, request_class: Any):
    unasked = {"runner", "workers", "side_by_side"} | ({"report_to"} if flow is evaluate else set())
    parameters = inspect.signature(flow.fn).parameters
    assert set(parameters) == set(request_class.model_fields) - unasked
    for name, parameter in parameters.items():
        field = request_class.model_fields[name]
        assert field.default == parameter.default or field.is_required(), name


def test_networks_are_a_choice_in_the_form():
    assert "edsr" in train_sr.parameters.properties["arch"]["enum"]
    assert train_sr.parameters.properties["arch"]["default"] == "edsr-small"


def test_runs_are_named_by_network_and_data():
    assert TrainRequest(data=Path("home/runs/demo/distilled")).run_name == "edsr-small-demo-distilled"
    assert TrainRequest(data=Path("/data/photos"), arch="my.module:Net").run_name == "my-module-Net-photos"
    assert EvaluateRequest(test=Path("/data/B100")).run_name == "evaluate-B100"


def test_trained_networks_are_listed_and_gc_spares_them(tmp_path: Path):
    photos, store = make_photos(tmp_path / "photos", 2), Store(tmp_path / "home")

    def trained(iterations: int) -> Path:
        request = TrainRequest(data=photos, iterations=iterations, overrides=QUICK, home=store.url)
        done = run_training(request, store, plain_backend(request, store))
        assert done.run == ("edsr-small-photos" if iterations == 2 else "edsr-small-photos-2")
        return done.weights.path

    first, second = trained(2), trained(3)
    assert trained(2) == first  # the same network goes on under its name
    request = EvaluateRequest(test=photos, weights=(str(first),), protocol={"lpips": False}, home=store.url)
    measured = run_evaluation(request, store, plain_backend(request, store))
    assert list(measured) == ["bicubic", str(first)]
    states = {state["name"]: state for state in list_runs(store)}
    assert {name: state["status"] for name, state in states.items()} == dict.fromkeys(
        ("edsr-small-photos", "edsr-small-photos-2", "evaluate-photos"), "completed"
    )
    assert states["edsr-small-photos-2"]["about"] == f"edsr-small, 3 iterations, on {photos}"
    with pytest.raises(InputError, match="a run of train-sr has no report"):
        read_record(store, "edsr-small-photos")
    assert collect_garbage(store, delete=True) == []
    assert first.is_dir()
    assert second.is_dir()
    assert not json.loads((store.home / "runs/edsr-small-photos/run.json").read_text()).get("kept")


def test_test_photos_among_the_data_are_left_out_of_a_training_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    photos, tests, store = make_photos(tmp_path / "photos", 4), tmp_path / "tests", Store(tmp_path / "home")
    tests.mkdir()
    shutil.copyfile(sorted(photos.iterdir())[1], tests / "renamed.png")
    common = {"iterations": 1, "overrides": QUICK, "home": store.url}
    request = TrainRequest(data=photos, test=tests, validation=ValidationConfig(every=1, metrics=("psnr_y",)), **common)
    done = run_training(request, store, plain_backend(request, store))
    assert (done.left_out, done.weights.manifest.counts["images"]) == (1, 3)
    assert read_run(store, done.run)["left_out"] == 1
    assert caplog.text.count("1 training photo is also a test photo and is left out of training: ") == 1
    remaining = sorted(photos.iterdir())
    remaining.pop(1).unlink()
    assert done.weights.manifest.parents["data"] == photo_source(photos).digest


def test_a_training_on_its_own_test_photos_is_refused_before_anything_is_built(tmp_path: Path):
    photos, store = make_photos(tmp_path / "photos", 2), Store(tmp_path / "home")
    request = TrainRequest(data=photos, test=photos, iterations=1, overrides=QUICK, home=store.url)
    with pytest.raises(ConfigError, match="all 2 training photos are test photos"):
        run_training(request, store, plain_backend(request, store))
    assert not (store.home / "artifacts").exists()
