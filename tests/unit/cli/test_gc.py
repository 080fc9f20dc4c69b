"""`ddsr gc`: what it removes, and what it leaves alone."""

import json
import shutil
from pathlib import Path

from ddsr_core.config import Runtime
from ddsr_core.storage.store import Store
from tests.helpers.cli import assert_failed, ddsr
from tests.helpers.toy_stage import TOY, CountConfig, inputs


def unused_artifact(home: Path) -> Path:
    """An artifact and a partial build that no run names, in a home; returns the artifact's folder."""
    log = home.parent / "log"
    log.touch()
    store = Store(home)
    artifact, _ = store.build(TOY, CountConfig(files=2), inputs(log), Runtime())
    partial = artifact.path.with_name("0" * 32 + ".partial")
    partial.mkdir()
    partial.with_name("0" * 32 + ".lock").touch()
    return artifact.path


def test_gc_removes_what_no_run_uses_and_only_when_told(tmp_path: Path):
    home = tmp_path / "home"
    folder = unused_artifact(home)
    listed = ddsr("gc", "--home", home).output
    assert "would remove toy, not finished, today (0.0 MB)\n    " in listed
    assert f"would remove toy, today (0.0 MB)\n    {folder}" in listed
    assert folder.exists()
    done = json.loads(ddsr("gc", "--delete", "--json", "--home", home).output)
    assert [Path(item["path"]).name for item in done["artifacts"]] == ["0" * 32 + ".partial", folder.name]
    assert [path.name for path in (home / "artifacts/toy").iterdir() if path.is_dir()] == []


def test_gc_refuses_a_folder_that_is_not_a_home(tmp_path: Path):
    album = tmp_path / "photos/artifacts/2024/holiday"
    album.mkdir(parents=True)
    (album / "beach.jpg").write_bytes(b"photo")
    assert_failed(ddsr("gc", "--delete", "--home", tmp_path / "photos"), "not a home of ddsr", "--home")
    assert (album / "beach.jpg").exists()


def test_gc_leaves_alone_what_ddsr_has_not_made(tmp_path: Path):
    home, outside = tmp_path / "home", tmp_path / "outside"
    folder = unused_artifact(home)
    shutil.copytree(folder, outside)
    (folder / "notes.txt").write_text("mine")
    (folder.parent / ("1" * 32)).symlink_to(outside)
    (home / "artifacts/linked").symlink_to(outside)
    (folder.parent / "holiday").mkdir()
    (folder.parent / ("2" * 32)).mkdir()
    (folder.parent / ("3" * 32 + ".partial")).mkdir()
    done = json.loads(ddsr("gc", "--delete", "--json", "--home", home).output)
    assert [Path(item["path"]).name for item in done["artifacts"]] == ["0" * 32 + ".partial"]
    reasons = {Path(path).name[:8]: reason for path, reason in done["left"].items()}
    assert reasons == {
        folder.name[:8]: "it contains a foreign file: notes.txt", "1" * 8: "it is a link",
        "holiday": "its name is not a key",
        "2" * 8: "its manifest is missing or damaged", "3" * 8: "it was not left by a build of ddsr",
    }  # fmt: skip
    assert (outside / "manifest.json").exists()


def test_gc_removes_nothing_while_the_record_of_a_run_cannot_be_read(tmp_path: Path):
    home = tmp_path / "home"
    folder = unused_artifact(home)
    Store(home).write_file("runs/cats/run.json", b"{")
    result = ddsr("gc", "--delete", "--home", home)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert folder.exists()
