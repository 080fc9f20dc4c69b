"""The store: a reader never sees half an artifact, a killed build continues, damage is repaired, two builders build once."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddsr_core.config import Runtime
from ddsr_core.errors import InputError, StorageError
from ddsr_core.storage.files import storage_errors, write_atomically
from ddsr_core.storage.stage import RESUME, Source, Stage, StageResult
from ddsr_core.storage.store import Store
from tests.helpers.toy_stage import TOY, CountConfig, count_up, inputs, key_of, wait_for

ROOT = Path(__file__).resolve().parents[3]


CHILD = """
import sys
from pathlib import Path
from ddsr_core.storage.stage import Source
from ddsr_core.storage.store import Store
from tests.helpers.toy_stage import TOY, CountConfig
Store(Path(sys.argv[1])).build(TOY, CountConfig(), {"source": Source(Path(sys.argv[2]), "digest")})
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.touch()
    return path


def child(home: Path, log: Path, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CHILD, str(home), str(log)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


def test_second_build_is_the_same_artifact_and_runs_nothing(tmp_path: Path, log: Path) -> None:
    store = Store(tmp_path / "home")
    first, cached = store.build(TOY, CountConfig(), inputs(log))
    assert not cached
    again, cached = store.build(TOY, CountConfig(), inputs(log))
    assert cached
    assert again == first
    assert log.read_text() == "0\n1\n2\n"
    assert set(first.manifest.files) == {"0.txt", "1.txt", "2.txt"}
    assert not (first.path / RESUME).exists()


def test_killed_build_leaves_a_partial_that_the_next_one_continues(tmp_path: Path, log: Path) -> None:
    home = tmp_path / "home"
    process = child(home, log, TOY_PAUSE="1", TOY_PAUSE_UNTIL="never")
    try:
        wait_for(lambda: log.read_text() == "0\n1\n")
        key = TOY.key(CountConfig(), inputs(log))
        partial = Store(home).folder("toy", f"{key}.partial")
        wait_for(lambda: (partial / RESUME / "done" / "1").exists())
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert Store(home).find("toy", key) is None
    assert partial.is_dir()

    artifact, cached = Store(home).build(TOY, CountConfig(), inputs(log))
    assert not cached
    assert log.read_text() == "0\n1\n2\n"  # nothing twice
    assert not partial.exists()
    other = tmp_path / "other"
    other.touch()
    undisturbed, _ = Store(tmp_path / "home2").build(TOY, CountConfig(), {"source": Source(other, "digest")})
    assert artifact.digest == undisturbed.digest


def test_second_process_waits_says_for_whom_and_goes_on_when_the_first_is_killed(
    tmp_path: Path, log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path / "home")
    first = child(store.home, log, TOY_PAUSE="1", TOY_PAUSE_UNTIL="never")
    results: list[Any] = []
    second = Thread(target=lambda: results.append(store.build(TOY, CountConfig(), inputs(log))))
    try:
        wait_for(lambda: log.read_text() == "0\n1\n")
        second.start()
        wait_for(lambda: "waiting for toy" in caplog.text)
        assert f"built by process {first.pid} on {socket.gethostname()}" in caplog.text
        assert second.is_alive()
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    second.join(30)  # the system has let go of the dead process's lock
    assert [cached for _, cached in results] == [False]
    assert log.read_text() in ("0\n1\n2\n", "0\n1\n1\n2\n")  # never from the start: at most the step it was killed in again
    assert not store.folder("toy", key_of(log) + ".owner").exists()


def test_second_process_waits_and_finds_what_the_first_has_built(
    tmp_path: Path, log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path / "home")
    first = child(store.home, log, TOY_PAUSE="1", TOY_PAUSE_UNTIL=str(tmp_path / "go"))
    results: list[Any] = []
    second = Thread(target=lambda: results.append(store.build(TOY, CountConfig(), inputs(log))))
    try:
        wait_for(lambda: log.read_text() == "0\n1\n")
        second.start()
        wait_for(lambda: "waiting for toy" in caplog.text)
        (tmp_path / "go").touch()
        assert first.wait(60) == 0
        second.join(60)
    finally:
        first.kill()
    assert [cached for _, cached in results] == [True]
    assert log.read_text() == "0\n1\n2\n"


def test_two_processes_build_once(tmp_path: Path, log: Path) -> None:
    builders = [child(tmp_path / "home", log) for _ in range(2)]
    assert [process.wait(60) for process in builders] == [0, 0]
    assert log.read_text() == "0\n1\n2\n"


@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "manifest"])
def test_damaged_artifact_is_not_found_and_is_rebuilt(tmp_path: Path, log: Path, damage: str) -> None:
    store = Store(tmp_path / "home")
    built, _ = store.build(TOY, CountConfig(), inputs(log))
    file = built.path / "1.txt"
    if damage == "changed":
        file.write_text("9")  # same size, other content
    elif damage == "cut":
        file.write_text("")
    elif damage == "missing":
        file.unlink()
    else:
        (built.path / "manifest.json").write_text("{")
    assert store.find("toy", built.key) is None
    again, cached = store.build(TOY, CountConfig(), inputs(log))
    assert not cached
    assert again.digest == built.digest
    assert (again.path / "1.txt").read_text() == "1"


def test_error_in_a_stage_keeps_the_partial_and_whole_artifacts(tmp_path: Path, log: Path) -> None:
    store = Store(tmp_path / "home")
    whole, _ = store.build(TOY, CountConfig(), inputs(log))

    def broken(config: CountConfig, *, source: Path, out: Path, runtime: Runtime) -> StageResult:
        (out / "half.bin").write_bytes(b"half")
        raise InputError("no good", where=source)

    stage = Stage("broken", 1, broken, CountConfig)
    with pytest.raises(InputError, match="no good"):
        store.build(stage, CountConfig(), inputs(log))
    key = stage.key(CountConfig(), inputs(log))
    assert store.find("broken", key) is None
    assert store.folder("broken", f"{key}.partial").is_dir()
    assert store.find("toy", whole.key) == whole


@pytest.mark.parametrize(
    ("number", "word"), [(errno.ENOSPC, "free some space"), (errno.EACCES, "--home"), (errno.EROFS, "read-only")]
)
def test_what_the_system_refuses_becomes_a_message_with_a_fix(tmp_path: Path, number: int, word: str) -> None:
    with pytest.raises(StorageError, match="cannot write") as caught, storage_errors(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "x"))
    assert caught.value.fix is not None
    assert word in caught.value.fix
    assert caught.value.where == str(tmp_path / "x")


def test_full_disk_in_a_stage_keeps_what_was_finished(tmp_path: Path, log: Path) -> None:
    store = Store(tmp_path / "home")
    whole, _ = store.build(TOY, CountConfig(), inputs(log))

    def full(config: CountConfig, *, source: Path, out: Path, runtime: Runtime) -> StageResult:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out / "big.bin"))

    with pytest.raises(StorageError, match="No space left"):
        store.build(Stage("full", 1, full, CountConfig), CountConfig(), inputs(log))
    assert store.find("toy", whole.key) == whole


def test_other_errors_of_the_system_are_not_disguised(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), storage_errors(tmp_path):
        raise IsADirectoryError(errno.EISDIR, "x")


def test_home_below_a_file_is_a_storage_error(tmp_path: Path, log: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        Store(tmp_path / "file" / "home").build(TOY, CountConfig(), inputs(log))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_home_is_a_storage_error(tmp_path: Path, log: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError):
        Store(tmp_path / "home").build(TOY, CountConfig(), inputs(log))


def test_key_depends_on_name_version_config_and_content_not_on_place(tmp_path: Path) -> None:
    here = {"source": Source(tmp_path / "a", "1")}
    key = TOY.key(CountConfig(), here)
    assert key == TOY.key(CountConfig(), {"source": Source(tmp_path / "b", "1")})
    others = [
        TOY.key(CountConfig(), {"source": Source(tmp_path / "a", "2")}),
        TOY.key(CountConfig(), {"other": Source(tmp_path / "a", "1")}),
        TOY.key(CountConfig(files=4), here),
        Stage("toy", 2, count_up, CountConfig).key(CountConfig(), here),
        Stage("toy2", 1, count_up, CountConfig).key(CountConfig(), here),
    ]
    assert len({key, *others}) == 6


@given(old=st.binary(max_size=64), new=st.binary(max_size=64))
@settings(max_examples=25, deadline=None)
def test_write_atomically_replaces_all_or_nothing(tmp_path_factory: pytest.TempPathFactory, old: bytes, new: bytes) -> None:
    path = tmp_path_factory.mktemp("atomic") / "sub" / "file"
    write_atomically(path, old)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="full"):  # noqa: PT012
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        write_atomically(path, new)
    assert path.read_bytes() == old
    write_atomically(path, new)
    assert path.read_bytes() == new


def test_manifest_says_what_was_made_from_what(tmp_path: Path, log: Path) -> None:
    built, _ = Store(tmp_path / "home").build(TOY, CountConfig(files=1), inputs(log), Runtime(device="cpu"))
    manifest = json.loads((built.path / "manifest.json").read_text())
    assert manifest["stage"] == "toy"
    assert manifest["config"] == {"files": 1}
    assert manifest["parents"] == {"source": "digest"}
    assert manifest["counts"] == {"files": 1}
    assert manifest["bytes"] == 1


def test_the_photo_cache_reaches_only_stages_that_use_one(tmp_path: Path, log: Path) -> None:
    seen = []

    def note(config: CountConfig, *, source: Path, out: Path, runtime: Runtime) -> StageResult:
        seen.append(runtime.photo_cache)
        (out / "note").touch()
        return StageResult()

    runtime = Runtime(photo_cache=tmp_path / "cache")
    Store(tmp_path / "a").build(Stage("note", 1, note, CountConfig), CountConfig(), inputs(log), runtime)
    Store(tmp_path / "b").build(Stage("note", 1, note, CountConfig, photo_cache=True), CountConfig(), inputs(log), runtime)
    assert seen == [None, tmp_path / "cache"]


def test_the_store_imports_no_heavy_library() -> None:
    """`ddsr runs` must answer at once."""
    heavy = ("torch", "numpy", "pyarrow", "lancedb")
    code = f"import sys, ddsr_core.storage.store; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
