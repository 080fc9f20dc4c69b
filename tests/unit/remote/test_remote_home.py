"""Runs, nights and garbage in a home on S3, and what is said where S3 refuses or does not answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ddsr_core.config import Runtime
from ddsr_core.errors import ConfigError, StorageError, UnreachableError
from ddsr_core.remote_store import open_store
from ddsr_core.store import Store
from tests.unit.fake_night import Fakes, put, without_reports
from tests.unit.remote.home import URL, Machines
from tests.unit.toy_stage import TOY, CountConfig, inputs

s3fs = pytest.importorskip("s3fs", reason="homes on S3 need the extra s3")


def test_gc_removes_what_no_run_names_but_not_what_is_built_now(machines: Machines, log: Path) -> None:
    from flows.housekeeping import collect_garbage

    here, there = machines
    kept, _ = here.build(TOY, CountConfig(files=1), inputs(log))
    unused, _ = here.build(TOY, CountConfig(files=2), inputs(log))
    locked, _ = here.build(TOY, CountConfig(files=3), inputs(log))
    here.bucket.write("runs/demo/run.json", json.dumps({"stages": [{"key": kept.key}]}).encode())
    here.bucket.write(f"artifacts/toy/{locked.key}.lock", b"")
    assert [place for place, _ in collect_garbage(there, delete=False)] == [f"{URL}/artifacts/toy/{unused.key}"]
    assert there.find("toy", unused.key) is not None
    collect_garbage(there, delete=True)
    assert [there.find("toy", item.key) is not None for item in (kept, unused, locked)] == [True, False, True]


def test_gc_elsewhere_spares_what_a_run_is_about_to_use(machines: Machines, log: Path) -> None:
    from flows.claims import claimer, drop_claims
    from flows.housekeeping import collect_garbage

    here, there = machines
    built, _ = here.build(TOY, CountConfig(), inputs(log))
    claimer(here, "demo")(built.key)
    claimer(there, "demo")("another")  # the run goes on elsewhere
    shutil.rmtree(here.home / "runs")
    assert collect_garbage(here, delete=True) == []
    drop_claims(there, "demo")
    there.push("runs/demo", mirror=True)
    shutil.rmtree(here.home / "runs")
    assert len(collect_garbage(here, delete=True)) == 2  # this machine's copy, and what is published


def test_nights_on_two_machines_share_registry_memo_and_set(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddsr_core.registry import read_registry
    from flows.challenge import roll_back
    from flows.housekeeping import collect_garbage

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
    assert fakes.spend(here, put(photos, "d"), test).after.champion == 2
    assert in_use() == 21.0  # not this machine's old copy
    roll_back(here, "n")
    assert in_use() == 20.0
    assert read_registry(there, "n").champion == 1

    here.bucket.remove(here.bucket.list("runs/"))
    here.bucket.remove(["nightly/n/current/metadata.jsonl"])
    for store in machines:
        shutil.rmtree(store.home)
    assert collect_garbage(there, delete=True)
    assert fakes.spend(there, photos, test).version is None
    assert in_use() == 20.0  # put in its place again
    assert roll_back(there, "n", 2).champion == 2
    assert in_use() == 21.0


def test_a_memo_that_has_lost_an_object_begins_anew(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_reports(monkeypatch)
    (here, there), fakes = machines, Fakes()
    photos, test = put(tmp_path / "photos", "a", "b"), put(tmp_path / "test", "t")
    fakes.spend(here, photos, test)
    here.bucket.remove(list(here.bucket.list("nightly/n/memo/files/"))[:1])
    second = fakes.spend(there, put(photos, "c"), test).version
    assert second is not None
    assert second.anew["photos"] == 3
    assert "it begins anew" in caplog.text


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
        lambda: store.pull("runs", ["run.json"]),
    ]
    for use in uses:
        with pytest.raises(StorageError, match="no bucket 'nobodys'") as caught:
            use()
        assert caught.value.where == "s3://nobodys/ddsr"
        assert "--home" in str(caught.value.mend)


def test_missing_credentials_say_so(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="no S3 credentials") as caught:
        open_store(URL).check()
    assert "AWS_ACCESS_KEY_ID" in str(caught.value.mend)


def test_server_that_does_not_answer_says_so(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UnreachableError, match="does not answer") as caught:
        open_store(URL).check()
    assert "finished stages are kept" in str(caught.value.mend)


def test_error_of_the_stage_itself_is_not_taken_for_one_of_s3(machines: Machines, log: Path) -> None:
    from ddsr_core.store import Stage, StageResult

    def broken(config: CountConfig, *, source: Path, out: Path, runtime: Runtime) -> StageResult:
        raise TimeoutError("the stage's own")

    with pytest.raises(TimeoutError, match="own"):
        machines[0].build(Stage("broken", 1, broken), CountConfig(), inputs(log))
    assert machines[0].bucket.list("artifacts/") == {}  # the lock is gone


def test_homes_that_are_none(tmp_path: Path) -> None:
    assert type(open_store(tmp_path)) is Store
    with pytest.raises(ConfigError, match="URL on S3"):
        open_store("gs://bucket")
    with pytest.raises(ConfigError, match="no bucket"):
        open_store("s3://")
    with pytest.raises(StorageError, match="home on this machine"):
        Store(Path(URL))
