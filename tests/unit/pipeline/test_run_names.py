"""A run never takes the name of a run of other photos, and one command at a time works on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ddsr_core.errors import ConfigError, StorageError
from ddsr_core.pipeline.model_files import ModelFiles
from ddsr_core.pipeline.request import RunRequest
from ddsr_core.pipeline.run import open_run
from ddsr_core.pipeline.run_folder import artifact_paths, list_runs
from ddsr_core.pipeline.run_state import complete_run
from ddsr_core.pipeline.stages import Backend, StageRun
from ddsr_core.storage.store import Store
from tests.helpers.toy_stage import TOY, CountConfig, inputs


def photos_in(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "photo.png").write_text(text)
    return folder


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(ModelFiles, "all_of", lambda *_: {})
    return Store(tmp_path / "home")


def begun(store: Store, photos: Path, more: tuple[str, ...] = (), **fields: Any) -> str:
    """The name of a run that is begun and left."""
    request = RunRequest(images=photos, overrides=("sr.archs=[]", *more), **fields)
    with open_run(request, store, Backend(no_build, store.url)) as run:
        return run.name


def no_build(*_: object) -> Any:
    raise AssertionError


def test_other_photos_get_another_name(store: Store, tmp_path: Path):
    first, second = photos_in(tmp_path / "cats", "a"), photos_in(tmp_path / "dogs", "b")
    (tmp_path / "more").mkdir()
    third = photos_in(tmp_path / "more/cats", "c")
    assert begun(store, first) == "demo-cats"
    assert begun(store, second) == "demo-dogs"
    assert begun(store, third) == "demo-cats-2"
    assert begun(store, first) == "demo-cats"  # it goes on
    assert begun(store, third) == "demo-cats-2"
    assert {state["name"] for state in list_runs(store)} == {"demo-cats", "demo-dogs", "demo-cats-2"}


def test_other_settings_get_another_name_once_a_run_has_finished(store: Store, tmp_path: Path):
    photos = photos_in(tmp_path / "cats", "a")
    other = ("clusters.k=3",)
    assert begun(store, photos) == "demo-cats"
    assert begun(store, photos, more=other) == "demo-cats"  # nothing to lose yet
    complete_run(store, "demo-cats", [])
    assert begun(store, photos, more=other) == "demo-cats"  # again, with its settings
    complete_run(store, "demo-cats", [])
    assert begun(store, photos) == "demo-cats-2"
    assert begun(store, photos, more=other) == "demo-cats"
    assert begun(store, photos, run="demo-cats") == "demo-cats"  # as the user says


def test_a_chosen_name_that_other_photos_have_is_refused_with_the_choice(store: Store, tmp_path: Path):
    assert begun(store, photos_in(tmp_path / "cats", "a"), run="mine") == "mine"
    with pytest.raises(ConfigError, match="made with other training or test photos") as caught:
        begun(store, photos_in(tmp_path / "dogs", "b"), run="mine")
    assert "--run mine-2" in str(caught.value.fix)
    (state,) = list_runs(store)
    assert state["images"] == str(tmp_path / "cats")


def test_a_second_command_on_a_run_is_told_who_works_on_it(store: Store, tmp_path: Path):
    photos = photos_in(tmp_path / "cats", "a")
    request = RunRequest(images=photos, overrides=("sr.archs=[]",))
    with open_run(request, store, Backend(no_build, store.url)):
        with pytest.raises(StorageError, match="the run 'demo-cats', begun by process"):
            begun(store, photos)
        (state,) = list_runs(store)
        assert state["status"] == "running"
    assert begun(store, photos) == "demo-cats"


def test_a_moved_home_works(tmp_path: Path, store: Store):
    log = tmp_path / "log"
    log.touch()
    built, _ = store.build(TOY, CountConfig(), inputs(log))
    name = begun(store, photos_in(tmp_path / "cats", "a"))
    complete_run(store, name, [StageRun("toy", built, False)])
    state = json.loads((store.home / f"runs/{name}/run.json").read_text())
    assert state["stages"][0]["path"] == f"artifacts/toy/{built.key}"
    shutil.move(store.home, tmp_path / "elsewhere")
    moved = Store(tmp_path / "elsewhere")
    assert artifact_paths(moved, name, "toy") == {"toy": moved.folder("toy", built.key)}
    assert (moved.folder("toy", built.key) / "0.txt").exists()
