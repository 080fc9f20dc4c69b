"""A home on S3, on a real server on this machine: whole or invisible, built once, mended, and clear when it is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ddsr_core.errors import StorageError
from ddsr_core.storage import remote_lock, s3
from ddsr_core.storage.files import sha256_of, write_json
from ddsr_core.storage.remote_lock import RemoteOwner
from ddsr_core.storage.stage import FileEntry, read_manifest
from ddsr_core.storage.store import Owner, Store
from tests.helpers.toy_stage import TOY, CountConfig, inputs, key_of, wait_for
from tests.unit.storage.remote.home import URL, Machines

s3fs = pytest.importorskip("s3fs", reason="homes on S3 need the extra s3")

ROOT = Path(__file__).resolve().parents[4]

#: Builds the toy stage; PAUSE_UPLOAD stops after the first file has been uploaded.
CHILD = """
import os, sys, time
from pathlib import Path
from ddsr_core.storage import remote_lock
from ddsr_core.config import Runtime
from ddsr_core.storage.remote_store import RemoteStore
from tests.unit.storage.remote.home import URL, Machines
from tests.helpers.toy_stage import TOY, CountConfig, inputs

remote_lock.HEARTBEAT_SECONDS, remote_lock.STALE_SECONDS, remote_lock.POLL_SECONDS = 0.5, 10.0, 0.2
store = RemoteStore("s3://team/ddsr")
if "PAUSE_UPLOAD" in os.environ:
    upload = store.bucket.upload
    def cut_off(files):
        upload(dict(list(files.items())[:1]))
        Path(os.environ["PAUSE_UPLOAD"]).touch()
        time.sleep(60)
    store.bucket.upload = cut_off
artifact, cached = store.build(TOY, CountConfig(), inputs(Path(sys.argv[1])), Runtime(run=sys.argv[2]))
print(cached, artifact.digest)
"""


def child(cache: Path, log: Path, run: str, **environment: str) -> subprocess.Popen[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "DDSR_CACHE": str(cache), **environment}
    command = [sys.executable, "-c", CHILD, str(log), run]
    return subprocess.Popen(command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_what_one_machine_builds_another_finds(machines: Machines, log: Path) -> None:
    here, other = machines
    built, cached = here.build(TOY, CountConfig(), inputs(log))
    assert not cached
    found, cached = other.build(TOY, CountConfig(), inputs(log))
    assert cached
    assert log.read_text() == "0\n1\n2\n"
    assert found.manifest == built.manifest
    assert found.path == other.folder("toy", built.key)
    assert sorted(path.name for path in found.path.iterdir()) == ["0.txt", "1.txt", "2.txt", "manifest.json"]
    assert (found.path / "2.txt").read_text() == "2"
    assert [name for name in here.bucket.list("artifacts/") if name.endswith(".lock")] == []


def test_key_and_digest_are_those_of_a_local_home(machines: Machines, log: Path, tmp_path: Path) -> None:
    remote, _ = machines[0].build(TOY, CountConfig(), inputs(log))
    local, _ = Store(tmp_path / "home").build(TOY, CountConfig(), inputs(log))
    assert (remote.key, remote.digest) == (local.key, local.digest)


def test_damaged_copy_in_the_cache_is_brought_again(machines: Machines, log: Path) -> None:
    here, _ = machines
    built, _ = here.build(TOY, CountConfig(), inputs(log))
    (built.path / "1.txt").write_text("9")
    found = here.find("toy", built.key)
    assert found is not None
    assert (found.path / "1.txt").read_text() == "1"
    assert log.read_text() == "0\n1\n2\n"


@pytest.mark.parametrize("damage", ["changed", "missing", "manifest"])
def test_damaged_object_is_not_found_and_is_rebuilt(machines: Machines, log: Path, damage: str) -> None:
    here, other = machines
    built, _ = here.build(TOY, CountConfig(), inputs(log))
    names = here.bucket.list(f"artifacts/toy/{built.key}/")
    file = next(name for name in names if name.endswith("manifest.json" if damage == "manifest" else "/1.txt"))
    if damage == "missing":
        here.bucket.remove([file])
    else:
        here.bucket.write(file, b"9")
    assert other.find("toy", built.key) is None
    again, cached = other.build(TOY, CountConfig(), inputs(log))
    assert not cached
    assert again.digest == built.digest
    assert here.find("toy", built.key) is not None


def test_killed_while_it_uploads_it_is_invisible_and_uploaded_by_the_next(
    machines: Machines, log: Path, tmp_path: Path
) -> None:
    here, other = machines
    process = child(tmp_path / "cache", log, "first", PAUSE_UPLOAD=str(tmp_path / "paused"))
    try:
        wait_for((tmp_path / "paused").exists)
    finally:
        kill(process)
    base = f"artifacts/toy/{key_of(log)}"
    assert [name.rpartition("/")[2] for name in here.bucket.list(base + "/")] == ["0.txt"]
    assert other.find("toy", key_of(log)) is None
    assert here.bucket.read(base + ".lock") is not None  # nobody has let go of it

    started = time.monotonic()
    here.build(TOY, CountConfig(), inputs(log))
    assert time.monotonic() - started < remote_lock.STALE_SECONDS  # the same cache folder: known to be dead
    assert log.read_text() == "0\n1\n2\n"  # uploaded, not built again
    assert other.find("toy", key_of(log)) is not None
    assert here.bucket.read(base + ".lock") is None


def test_lock_of_a_builder_that_was_killed_elsewhere_becomes_stale(
    machines: Machines, log: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = child(tmp_path / "third", log, "first", TOY_PAUSE="1", TOY_PAUSE_UNTIL="never")
    try:
        wait_for(lambda: log.read_text() == "0\n1\n")
    finally:
        kill(process)
    artifact, cached = machines[0].build(TOY, CountConfig(), inputs(log))
    assert not cached
    assert artifact.manifest.counts == {"files": 3}
    assert f"built by process {process.pid} on " in caplog.text
    assert "(run first)" in caplog.text
    assert "has died" in caplog.text


def test_second_machine_says_whom_it_waits_for_and_waits_while_the_heart_beats(
    machines: Machines, log: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = child(tmp_path / "third", log, "first", TOY_PAUSE="1", TOY_PAUSE_UNTIL=str(tmp_path / "go"))
    results: list[Any] = []
    second = threading.Thread(target=lambda: results.append(machines[0].build(TOY, CountConfig(), inputs(log))))
    try:
        wait_for(lambda: log.read_text() == "0\n1\n")
        second.start()
        wait_for(lambda: f"built by process {first.pid} on " in caplog.text)
        second.join(remote_lock.STALE_SECONDS + 1)
        assert second.is_alive()
        (tmp_path / "go").touch()
        printed = first.communicate(timeout=150)[0].split()
        second.join(150)
    finally:
        first.kill()
    [(artifact, cached)] = results
    assert cached
    assert printed == ["False", artifact.digest]
    assert log.read_text() == "0\n1\n2\n"
    assert "(run first)" in caplog.text
    assert "has died" not in caplog.text


def test_two_processes_that_start_at_once_build_once(endpoint: str, log: Path, tmp_path: Path) -> None:
    builders = [child(tmp_path / cache, log, cache) for cache in ("one", "two")]
    assert {process.communicate(timeout=150)[0].split()[0] for process in builders} == {"True", "False"}
    assert log.read_text() == "0\n1\n2\n"


def test_of_two_that_publish_the_first_counts(machines: Machines, log: Path) -> None:
    """As where a lock was taken over from a builder that was only slow."""
    here, other = machines
    for name, store in (("1", here), ("2", other)):
        local, _ = Store(store.home).build(TOY, CountConfig(files=1), inputs(log))
        if name == "2":
            _rewrite(local.path, "other")
    one, two = (Store(store.home).find("toy", local.key) for store in machines)
    assert one is not None
    assert two is not None
    assert here._publish(one) == one
    assert other._publish(two).manifest == one.manifest
    assert (other.folder("toy", one.key) / "0.txt").read_text() == "0"
    assert len(here.bucket.list("artifacts/")) == 2  # the second's file is gone again


def _rewrite(folder: Path, text: str) -> None:
    """What another builder could have made: another content, with a manifest that belongs to it."""
    (folder / "0.txt").write_text(text)
    manifest = read_manifest(folder)
    assert manifest is not None
    entry = FileEntry(bytes=len(text), sha256=sha256_of(folder / "0.txt"))
    changed = manifest.model_copy(update={"files": {"0.txt": entry}, "bytes": entry.bytes}).checked()
    write_json(folder / "manifest.json", changed.model_dump(mode="json"))


def test_of_many_that_take_a_lock_one_holds_it_at_a_time(endpoint: str) -> None:
    bucket, inside, most = s3.Bucket(URL), [0], [0]

    def work(index: int) -> None:
        owner = RemoteOwner(**Owner.here(str(index)).model_dump(), cache=str(index))
        with remote_lock.remote_lock(bucket, "x.lock", owner):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.05)
            inside[0] -= 1

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(150)
    assert most == [1]
    assert bucket.read("x.lock") is None


def test_holder_that_was_taken_over_from_leaves_the_new_lock_alone(endpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    bucket = s3.Bucket(URL)
    with remote_lock.remote_lock(bucket, "x.lock", RemoteOwner(**Owner.here("").model_dump(), cache="a")):
        bucket.write("x.lock", b"another's")
        wait_for(lambda: "taken over" in caplog.text)
    current = bucket.read("x.lock")
    assert current is not None
    assert current[0] == b"another's"


def test_conditional_writes(endpoint: str) -> None:
    bucket = s3.Bucket(URL)
    etag = bucket.create("a", b"1")
    assert etag is not None
    assert bucket.create("a", b"2") is None
    assert bucket.read("a") == (b"1", etag)
    new = bucket.replace("a", b"3", etag)
    assert new is not None
    assert bucket.replace("a", b"4", etag) is None
    assert bucket.read("a") == (b"3", new)
    bucket.remove(["a", "never written"])
    assert bucket.read("a") is None
    assert bucket.replace("a", b"5", new) is None


@pytest.mark.parametrize("url", ["s3://team", "s3://team/deep/er/"])
def test_names_are_relative_to_the_url(endpoint: str, url: str) -> None:
    bucket = s3.Bucket(url)
    assert bucket.list("runs/") == {}
    bucket.write("runs/demo/run.json", b"{}")
    bucket.write("runs-of-another", b"")
    assert list(bucket.list("runs/")) == ["runs/demo/run.json"]


def test_run_folder_is_published_and_listed_elsewhere(machines: Machines, log: Path) -> None:
    from ddsr_core.pipeline.config import load_config
    from ddsr_core.pipeline.run_folder import list_runs, read_run
    from ddsr_core.pipeline.run_state import fail_run, start_run

    here, other = machines
    start_run(here, "demo", load_config("demo", None, ()), log, None)
    assert [state["status"] for state in list_runs(other)] == ["running"]
    fail_run(here, "demo", "no reason")
    assert read_run(other, "demo")["message"] == "no reason"
    (here.home / "runs/demo/config.toml").unlink()
    here.push("runs/demo", mirror=True)
    assert "runs/demo/config.toml" not in here.bucket.list("runs/")


def test_record_of_a_run_has_the_places_of_this_machine(machines: Machines, log: Path) -> None:
    from ddsr_core.pipeline.run_state import read_record

    here, other = machines
    built, _ = here.build(TOY, CountConfig(), inputs(log))
    stage = {"name": "toy", "key": built.key, "seconds": 1.0, "cached": False, "path": str(built.path)}
    state = {"name": "night", "preset": "demo", "status": "completed", "stages": [stage], "bicubic_path": str(built.path)}
    here.bucket.write("runs/night/run.json", json.dumps(state).encode())
    here.bucket.write("runs/night/config.toml", b"")
    record = read_record(other, "night")
    assert record.stages[0].path == record.bicubic_path == other.folder("toy", built.key)
    assert (record.stages[0].path / "0.txt").exists()


def test_commands_take_the_url(machines: Machines, log: Path) -> None:
    from click.testing import CliRunner

    from ddsr_core.pipeline.config import load_config
    from ddsr_core.pipeline.run_state import start_run
    from flows.cli.main import cli

    start_run(machines[0], "night", load_config("demo", None, ()), log, None)
    listed = CliRunner().invoke(cli, ["runs", "--home", URL])
    assert ["night", "running"] in [line.split()[:2] for line in listed.output.splitlines()]
    shown = CliRunner().invoke(cli, ["show", "night"], env={"DDSR_HOME": URL})
    assert shown.output.startswith("night: running")
    lost = CliRunner().invoke(cli, ["show", "dawn", "--home", URL])
    assert lost.exit_code == 1
    assert "runs here: night" in lost.output
    assert f"{URL}/runs" in lost.output


def test_task_on_another_machine_brings_its_inputs(machines: Machines, log: Path) -> None:
    from ddsr_core.storage.store import InputRef

    here, other = machines
    built, _ = here.build(TOY, CountConfig(), inputs(log))
    reference = InputRef.model_validate_json(InputRef.of(built).model_dump_json())
    assert reference.source(here).path == built.path
    source = reference.source(other)  # not from the other's cache folder, though this test could reach it
    assert (source.path, source.digest) == (other.folder("toy", built.key), built.digest)
    assert (source.path / "0.txt").exists()


def test_artifact_named_in_a_run_is_brought(machines: Machines, log: Path) -> None:
    here, other = machines
    built, _ = here.build(TOY, CountConfig(), inputs(log))
    assert other.bring(built.path) == other.folder("toy", built.key)
    assert (other.folder("toy", built.key) / "0.txt").exists()
    with pytest.raises(StorageError, match="missing or damaged"):
        other.bring(built.path.with_name("0" * 32))
