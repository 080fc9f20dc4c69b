"""Enlarged images and exported models are named runs, and gc spares the weights that they were made with."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from ddsr_core.config import Runtime
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.gc import collect_garbage
from ddsr_core.pipeline.output_runs import NetworkExportRequest, UpscaleRequest, run_network_export, run_upscale
from ddsr_core.pipeline.plain import plain_backend
from ddsr_core.pipeline.run_folder import list_runs
from ddsr_core.pipeline.step_runs import TrainRequest, run_training
from ddsr_core.storage.files import now
from ddsr_core.storage.store import Store
from tests.helpers.commands import make_photos


def trained(store: Store, photos: Path) -> Path:
    """Weights that no run names any more: the folder of the run that trained them is gone."""
    request = TrainRequest(data=photos, iterations=2, overrides=("batch_size=2", "lr_patch_px=8"), home=store.url)
    done = run_training(request, store, plain_backend(request, store))
    (store.home / "runs" / done.run / "run.json").unlink()
    return done.weights.path


def test_enlarged_images_are_a_run_that_keeps_its_network(tmp_path: Path):
    photos, store = make_photos(tmp_path / "photos", 2), Store(tmp_path / "home")
    weights = trained(store, photos)
    (item,) = collect_garbage(store, delete=False)
    assert (item.what, item.place) == ("edsr-small, 2 iterations", weights)
    assert item.made is not None
    assert abs(datetime.fromisoformat(now()) - item.made.astimezone(UTC)).days == 0

    def enlarged(out: str, name: str | None = None) -> str:
        request = UpscaleRequest(images=photos, output=tmp_path / out, weights=weights, run=name, existing="overwrite")
        return run_upscale(request, store, Runtime())[0]

    assert [enlarged("big"), enlarged("big"), enlarged("more")] == ["upscale-photos", "upscale-photos", "upscale-photos-2"]
    states = {state["name"]: state for state in list_runs(store)}
    state = states["upscale-photos"]
    assert (state["status"], state["kind"], state["output"]) == ("completed", "upscale", str(tmp_path / "big"))
    assert state["about"] == f"{photos} enlarged with edsr-small x4"
    assert [stage["key"] for stage in state["stages"]] == [weights.name]
    assert collect_garbage(store, delete=True) == []
    with pytest.raises(ConfigError, match=r"another run 'upscale-photos': .* enlarged with edsr-small x4"):
        enlarged("third", "upscale-photos")


def test_wrong_arguments_leave_no_run_behind(tmp_path: Path):
    photos, store = make_photos(tmp_path / "photos", 1), Store(tmp_path / "home")
    weights = trained(store, photos)
    with pytest.raises(InputError, match="no such image"):
        run_upscale(UpscaleRequest(images=tmp_path / "none", output=tmp_path / "out", weights=weights), store, Runtime())
    with pytest.raises(InputError, match="is not a format"):
        run_network_export(NetworkExportRequest(weights=weights, output=tmp_path / "x.pth"), store)
    assert list_runs(store) == []


def test_an_exported_network_is_a_run(tmp_path: Path):
    store = Store(tmp_path / "home")
    weights = trained(store, make_photos(tmp_path / "photos", 1))
    done = run_network_export(NetworkExportRequest(weights=weights / "weights.pth", output=tmp_path / "x4.onnx"), store)
    assert done.run == "export-x4"
    (state,) = list_runs(store)
    assert (state["status"], state["kind"], state["about"]) == ("completed", "export-sr", "edsr-small x4 as ONNX")
    assert collect_garbage(store, delete=True) == []
