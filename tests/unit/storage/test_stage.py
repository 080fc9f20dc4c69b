"""Artifacts: the manifest is bound to its folder, and readers beside the pipeline check what they read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ddsr_core.errors import ChangedInputError, StorageError
from ddsr_core.storage.stage import MANIFEST, Artifact, Stage, StageResult, foreign_files, is_whole, open_artifact
from ddsr_core.storage.store import Store
from tests.helpers.toy_stage import TOY, CountConfig, inputs


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.touch()
    return path


@pytest.fixture
def built(tmp_path: Path, log: Path) -> Artifact:
    return Store(tmp_path / "home").build(TOY, CountConfig(), inputs(log))[0]


def change(built: Artifact, **fields: Any) -> None:
    path = built.path / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "fields",
    [
        {"counts": {"files": 30}},
        {"digest": "0" * 64},
        {"key": "0" * 32},
        {"stage": "tiny"},
        {"config": {"files": 4}},
        {"parents": {"source": "another"}},
        {"stage_version": 2},
        {"created": "2020-01-01T00:00:00+00:00"},
        {"files": {}},
        {"files": {}, "bytes": 0, "check": None},
    ],
    ids=str,
)
def test_a_changed_manifest_is_not_believed(built: Artifact, log: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    change(built, **fields)
    store = Store(tmp_path / "home")
    assert store.find("toy", built.key) is None
    with pytest.raises(StorageError, match="missing or damaged"):
        open_artifact(built.path)
    again, cached = store.build(TOY, CountConfig(), inputs(log))
    assert not cached
    assert again.manifest.counts == {"files": 3}
    assert again.digest == built.digest


def test_a_manifest_of_an_earlier_version_without_its_own_digest_is_read(built: Artifact, tmp_path: Path) -> None:
    manifest = json.loads((built.path / MANIFEST).read_text())
    del manifest["check"]
    (built.path / MANIFEST).write_text(json.dumps(manifest))
    assert Store(tmp_path / "home").find("toy", built.key) is not None


def test_an_artifact_in_the_folder_of_another_is_not_believed(built: Artifact, tmp_path: Path) -> None:
    other = built.path.with_name("f" * 32)
    shutil.copytree(built.path, other)
    assert Store(tmp_path / "home").find("toy", other.name) is None


def test_a_foreign_file_is_found_and_set_aside(built: Artifact, tmp_path: Path, log: Path) -> None:
    (built.path / "1 (conflicted copy).txt").write_text("1")
    (built.path / "sub").mkdir()
    (built.path / "sub/.DS_Store").write_text("x")
    assert foreign_files(built.path, built.manifest) == ["1 (conflicted copy).txt", "sub/.DS_Store"]
    assert not is_whole(built.path, built.manifest)
    with pytest.raises(StorageError, match="foreign file: 1 "):
        open_artifact(built.path)
    again, cached = Store(tmp_path / "home").build(TOY, CountConfig(), inputs(log))
    assert cached
    assert again == built
    aside = tmp_path / "home/set-aside/toy" / built.key
    assert (aside / "1 (conflicted copy).txt").read_text() == "1"
    assert open_artifact(built.path) == built


def test_a_reader_says_which_artifact_is_damaged(built: Artifact) -> None:
    (built.path / "1.txt").write_text("9")
    with pytest.raises(StorageError, match="missing or damaged") as caught:
        open_artifact(built.path)
    assert caught.value.where == str(built.path)


def test_a_home_can_be_moved_and_copied(built: Artifact, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "home", tmp_path / "copy")
    (tmp_path / "home").rename(tmp_path / "moved")
    for place in ("moved", "copy"):
        home = tmp_path / place
        assert Store(home).bring(built.path) == home / "artifacts/toy" / built.key
    shutil.rmtree(tmp_path / "copy/artifacts")
    with pytest.raises(StorageError, match="run again"):
        Store(tmp_path / "copy").bring(built.path)


def test_a_link_in_the_place_of_an_artifact_is_removed_and_not_followed(built: Artifact, tmp_path: Path, log: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").write_text("holiday")
    shutil.rmtree(built.path)
    built.path.symlink_to(tmp_path / "mine")
    again, cached = Store(tmp_path / "home").build(TOY, CountConfig(), inputs(log))
    assert not cached
    assert again.digest == built.digest
    assert (tmp_path / "mine/photo.jpg").read_text() == "holiday"


def test_a_stage_that_has_read_another_input_leaves_nothing(tmp_path: Path, log: Path) -> None:
    def read(config: CountConfig, *, source: Path, out: Path, runtime: object) -> StageResult:
        (out / "x").write_text("made of something else")
        return StageResult(inputs={"source": "another digest"})

    stage, store = Stage("reader", 1, read, CountConfig), Store(tmp_path / "home")
    with pytest.raises(ChangedInputError, match="source changed"):
        store.build(stage, CountConfig(), inputs(log))
    assert [path.suffix for path in (tmp_path / "home/artifacts/reader").iterdir()] == [".lock"]


def test_a_stage_that_writes_nothing_is_an_error(tmp_path: Path, log: Path) -> None:
    stage = Stage("idle", 1, lambda config, **_: StageResult(), CountConfig)
    with pytest.raises(StorageError, match="written nothing"):
        Store(tmp_path / "home").build(stage, CountConfig(), inputs(log))
