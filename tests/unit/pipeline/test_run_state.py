"""What a run shows can be edited without damage to its artifacts, and is complete when run.json says so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddsr_core.errors import InputError
from ddsr_core.pipeline import run_state
from ddsr_core.pipeline.config import PipelineConfig, load_config
from ddsr_core.pipeline.run_folder import read_config, read_run
from ddsr_core.pipeline.run_state import (
    complete_run,
    failure_noted,
    finish_run,
    publish_distilled,
    publish_networks,
    start_run,
)
from ddsr_core.storage.store import Store
from tests.helpers.toy_stage import TOY, CountConfig, inputs


def test_an_edited_published_set_leaves_the_artifact_whole(tmp_path: Path):
    store = Store(tmp_path / "home")
    (tmp_path / "log").touch()
    artifact, _ = store.build(TOY, CountConfig(), inputs(tmp_path / "log"))
    target = tmp_path / "home/runs/r/distilled"
    target.parent.mkdir(parents=True)
    publish_distilled(artifact, target)
    files = {path.relative_to(artifact.path) for path in artifact.path.rglob("*") if path.is_file()}
    published = {path.relative_to(target) for path in target.rglob("*") if path.is_file()}
    assert published == files - {Path("manifest.json")}
    assert all((target / name).read_bytes() == (artifact.path / name).read_bytes() for name in published)
    before = {name: (artifact.path / name).read_bytes() for name in published}
    for name in published:
        with (target / name).open("r+b") as file:
            file.write(b"edited")
    assert {name: (artifact.path / name).read_bytes() for name in published} == before
    assert not any((target / name).samefile(artifact.path / name) for name in published)
    publish_distilled(artifact, target)
    assert {name: (target / name).read_bytes() for name in published} == before
    assert [path.name for path in target.parent.iterdir()] == ["distilled"]


def test_published_weights_are_copies(tmp_path: Path):
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    training = SimpleNamespace(artifact=SimpleNamespace(path=tmp_path))
    publish_networks([SimpleNamespace(arch="a:B", source="full", seed=0, training=training)], tmp_path / "networks")
    (copy,) = (tmp_path / "networks").iterdir()
    assert copy.name == "a-B-full.safetensors"
    copy.write_bytes(b"edited")
    assert (tmp_path / "weights.safetensors").read_bytes() == b"weights"


def test_the_config_of_a_run_is_read_with_its_unset_fields(tmp_path: Path):
    store, config = Store(tmp_path / "home"), load_config("demo")
    start_run(store, "cats", config, tmp_path, None)
    assert config.vae is None
    assert read_config(store, "cats")["vae"] is None
    assert PipelineConfig.model_validate(read_config(store, "cats")) == config


class Watched(Store):
    """Notes what run.json said at each upload of a run folder."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.uploaded: list[str] = []

    def push(self, folder: str, *, mirror: bool = False) -> None:
        self.uploaded.append(str(read_run(self, folder.removeprefix("runs/"))["status"]))


@pytest.fixture
def begun(tmp_path: Path) -> Any:
    """A run that has built one stage: its store, what it has distilled, and its stages."""
    store = Watched(tmp_path / "home")
    (tmp_path / "log").touch()
    artifact, _ = store.build(TOY, CountConfig(), inputs(tmp_path / "log"))
    config = load_config("demo")
    start_run(store, "cats", config, tmp_path, None)
    labels = SimpleNamespace(patches=artifact)
    return store, SimpleNamespace(images=artifact, labels=labels), SimpleNamespace(config=config, runs=[])


def test_a_run_whose_report_cannot_be_written_is_not_completed(begun: Any, monkeypatch: pytest.MonkeyPatch):
    store, distilled, stages = begun

    def no_report(*_: object) -> Path:
        raise InputError("a picture is missing", fix="run again")

    monkeypatch.setattr(run_state, "write_report", no_report)
    with pytest.raises(InputError), failure_noted(store, "cats"):
        finish_run(store, "cats", stages, distilled, None)
    state = read_run(store, "cats")
    assert state["status"] == "failed"
    assert state["message"].startswith("a picture is missing")


def test_a_run_is_completed_after_everything_else_is_published(begun: Any, monkeypatch: pytest.MonkeyPatch):
    store, distilled, stages = begun
    monkeypatch.setattr(run_state, "write_report", lambda folder, record: folder / "report.html")
    monkeypatch.setattr(run_state, "write_data_card", lambda folder, record: folder)
    finish_run(store, "cats", stages, distilled, None)
    assert store.uploaded == ["running", "running"]  # at the start, and with its results
    assert read_run(store, "cats")["status"] == "completed"
    start_run(store, "cats", stages.config, store.home, None)
    complete_run(store, "cats", [])
    assert store.uploaded[2:] == ["running", "running"]
    assert read_run(store, "cats")["status"] == "completed"
