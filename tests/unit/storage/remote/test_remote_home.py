"""Runs, nights and garbage in a home on S3, and what is said where S3 refuses or does not answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ddsr_core.config import Runtime
from ddsr_core.errors import ConfigError, StorageError, UnreachableError
from ddsr_core.pipeline.stages import StageRun
from ddsr_core.storage.remote_store import open_store
from ddsr_core.storage.store import Store
from tests.helpers.fake_night import Fakes, put, without_reports
from tests.helpers.toy_stage import TOY, CountConfig, inputs
from tests.unit.storage.remote.home import URL, Machines

s3fs = pytest.importorskip("s3fs", reason="homes on S3 need the extra s3")


def test_gc_removes_what_no_run_names_but_not_what_is_built_now(machines: Machines, log: Path) -> None:
    from ddsr_core.gc import collect_garbage

    here, there = machines
    kept, _ = here.build(TOY, CountConfig(files=1), inputs(log))
    unused, _ = here.build(TOY, CountConfig(files=2), inputs(log))
    locked, _ = here.build(TOY, CountConfig(files=3), inputs(log))
    here.bucket.write("runs/demo/run.json", json.dumps({"stages": [{"key": kept.key}]}).encode())
    here.bucket.write(f"artifacts/toy/{locked.key}.lock", b"")
    assert [item.place for item in collect_garbage(there, delete=False)] == [f"{URL}/artifacts/toy/{unused.key}"]
    assert there.find("toy", unused.key) is not None
    collect_garbage(there, delete=True)
    assert [there.find("toy", item.key) is not None for item in (kept, unused, locked)] == [True, False, True]


def test_gc_elsewhere_spares_what_a_run_is_about_to_use_or_has_used_before(machines: Machines, log: Path) -> None:
    from ddsr_core.gc import collect_garbage, used_keys
    from ddsr_core.pipeline.config import load_config
    from ddsr_core.pipeline.pins import Pins
    from ddsr_core.pipeline.run_state import complete_run, start_run

    here, there = machines
    config = load_config("demo", None, ())
    built, _ = here.build(TOY, CountConfig(), inputs(log))
    start_run(here, "demo", config, log, None)
    pins = Pins(here, "demo")
    pins.add(built.key)
    assert collect_garbage(there, delete=True) == []
    complete_run(here, "demo", [StageRun("toy", built, False)])
    pins.drop()
    assert used_keys(there) == {built.key}
    start_run(there, "demo", config, log, None)  # it begins again on the other machine, which has never seen it
    assert used_keys(here) == {built.key}
    complete_run(there, "demo", [])
    assert len(collect_garbage(here, delete=True)) == 2  # this machine's copy, and what is published


def test_looking_at_runs_leaves_the_files_of_one_that_goes_on_alone(machines: Machines, log: Path) -> None:
    from ddsr_core.pipeline.config import load_config
    from ddsr_core.pipeline.run_folder import list_runs, read_run
    from ddsr_core.pipeline.run_state import start_run

    here, there = machines
    folder = start_run(here, "demo", load_config("demo", None, ()), log, None)
    (folder / "run.json").write_text('{"status": "completed"}')  # and its report is being written
    assert [state["status"] for state in list_runs(here)] == ["running"]
    assert read_run(there, "demo")["status"] == "running"
    assert (folder / "run.json").read_text() == '{"status": "completed"}'


def test_objects_are_removed_by_their_names_not_by_patterns(machines: Machines) -> None:
    here, _ = machines
    for name in ("runs/abc/x", "runs/a*/x", "runs/v[1]/x"):
        here.write_file(name, b"")
    here.remove_file("runs/a*/x")
    here.remove_file("runs/v[1]/x")
    here.remove_file("runs/none")
    assert here.sizes("runs") == {"abc/x": 0}


def test_s3_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from ddsr_core.storage import remote_store

    slept: list[float] = []
    monkeypatch.setattr(remote_store.time, "sleep", slept.append)
    answers: list[Exception | None] = [UnreachableError("silent"), UnreachableError("silent"), None]

    def call() -> str:
        if (error := answers.pop(0)) is not None:
            raise error
        return "local"

    assert remote_store.retry_while_unreachable(call) == "local"
    assert slept == [5.0, 30.0]
    answers += [UnreachableError("silent")] * 3
    with pytest.raises(UnreachableError):
        remote_store.retry_while_unreachable(call)


def test_nights_on_two_machines_share_registry_memo_and_set(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddsr_core.gc import collect_garbage
    from ddsr_core.nightly.night import roll_back
    from ddsr_core.nightly.registry import read_registry

    without_reports(monkeypatch)
    (here, there), fakes = machines, Fakes()
    photos, test = put(tmp_path / "photos", "a", "b"), put(tmp_path / "test", "t")

    def in_use() -> float:
        return float(here.read_file("nightly/n/current/metadata.jsonl") or b"nan")

    fakes.spend(here, photos, test)
    assert fakes.spend(there, photos, test).version is None
    fakes.quality = 21.0
    second = fakes.spend(there, put(photos, "c"), test).version
    assert second is not None
    assert (second.promoted, second.warm_from, second.anew["photos"]) == (True, 1, 1)
    fakes.quality = 19.0
    assert fakes.spend(here, put(photos, "d"), test).after.active == 2
    assert in_use() == 21.0  # not this machine's old copy
    roll_back(here, "n")
    assert in_use() == 20.0
    assert read_registry(there, "n").active == 1

    here.bucket.remove(here.bucket.list("runs/"))
    here.bucket.remove(["nightly/n/current/metadata.jsonl"])
    for store in machines:
        shutil.rmtree(store.home)
    assert collect_garbage(there, delete=True)
    assert fakes.spend(there, photos, test).version is None
    assert in_use() == 20.0  # put in its place again
    assert roll_back(there, "n", 2).active == 2
    assert in_use() == 21.0


def test_a_memo_that_has_lost_an_object_begins_anew(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_reports(monkeypatch)
    (here, there), fakes = machines, Fakes()
    photos, test = put(tmp_path / "photos", "a", "b"), put(tmp_path / "test", "t")
    fakes.spend(here, photos, test)
    here.bucket.remove(list(here.bucket.list("nightly/n/photo_cache/files/"))[:1])
    second = fakes.spend(there, put(photos, "c"), test).version
    assert second is not None
    assert second.anew["photos"] == 3
    assert "it is discarded" in caplog.text


def test_a_lock_that_nobody_wants_to_wait_for(machines: Machines) -> None:
    here, there = machines
    with (
        here.locked("x", "first", "a night, begun"),
        pytest.raises(StorageError, match="a night, begun by process"),
        there.locked("x", what="a night, begun", wait=False),
    ):
        pass
    with there.locked("x", wait=False):
        assert there.bucket.read("x.lock") is not None


def test_missing_bucket_says_so(endpoint: str, log: Path) -> None:
    store = open_store("s3://nobodys/ddsr")
    uses: list[Callable[[], object]] = [
        store.check,
        lambda: store.find("toy", "0" * 32),
        lambda: store.sizes("runs"),
    ]
    for use in uses:
        with pytest.raises(StorageError, match="no bucket 'nobodys'") as caught:
            use()
        assert caught.value.where == "s3://nobodys/ddsr"
        assert "--home" in str(caught.value.fix)


def test_missing_credentials_say_so(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="no S3 credentials") as caught:
        open_store(URL).check()
    assert "AWS_ACCESS_KEY_ID" in str(caught.value.fix)


def test_server_that_does_not_answer_says_so(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UnreachableError, match="does not answer") as caught:
        open_store(URL).check()
    assert "finished stages are kept" in str(caught.value.fix)


def test_error_of_the_stage_itself_is_not_taken_for_one_of_s3(machines: Machines, log: Path) -> None:
    from ddsr_core.storage.stage import Stage, StageResult

    def broken(config: CountConfig, *, source: Path, out: Path, runtime: Runtime) -> StageResult:
        raise TimeoutError("the stage's own")

    with pytest.raises(TimeoutError, match="own"):
        machines[0].build(Stage("broken", 1, broken, CountConfig), CountConfig(), inputs(log))
    assert machines[0].bucket.list("artifacts/") == {}  # the lock is gone


def test_homes_that_are_none(tmp_path: Path) -> None:
    assert type(open_store(tmp_path)) is Store
    with pytest.raises(ConfigError, match="URL on S3"):
        open_store("gs://bucket")
    with pytest.raises(ConfigError, match="no bucket"):
        open_store("s3://")
    with pytest.raises(StorageError, match="home on this machine"):
        Store(Path(URL))


def test_photos_are_not_held_out_for_machines_that_do_not_see_them(machines: Machines, tmp_path: Path) -> None:
    from ddsr_core.pipeline.request import Execution
    from ddsr_core.pipeline.run import require_one_machine

    for elsewhere in (Execution(gpu="pool"), Execution(runner="ray")):
        with pytest.raises(ConfigError, match="held out") as caught:
            require_one_machine(elsewhere, machines[0])
        assert "name test photos" in str(caught.value.fix)
        with pytest.raises(ConfigError, match="3 training photos are also test photos; they cannot be left out") as caught:
            require_one_machine(elsewhere, machines[0], left_out=3)
        assert caught.value.fix == "remove them from the training photos"
        require_one_machine(elsewhere, Store(tmp_path))
    require_one_machine(Execution(runner="processes"), machines[0])


def test_gc_removes_nothing_from_a_prefix_that_is_not_a_home(machines: Machines, log: Path) -> None:
    from ddsr_core.gc import collect_garbage

    here, there = machines
    photo = "artifacts/2024/holiday/a.jpg"
    here.bucket.write(photo, b"the user's")
    with pytest.raises(StorageError, match="not a home of ddsr"):
        collect_garbage(here, delete=True)
    assert here.bucket.read(photo) is not None
    unused, _ = here.build(TOY, CountConfig(), inputs(log))
    assert here.bucket.read(".ddsr-home") is not None
    assert [item.place for item in collect_garbage(there, delete=True)] == [f"{URL}/artifacts/toy/{unused.key}"]
    assert here.bucket.read(photo) is not None


def test_a_home_of_an_earlier_version_is_known_by_its_artifacts(machines: Machines, log: Path) -> None:
    here, there = machines
    assert not there.is_marked()
    here.build(TOY, CountConfig(), inputs(log))
    here.bucket.remove([".ddsr-home"])
    assert there.is_marked()
