"""What `ddsr gc` leaves to runs that go on, have failed, or are begun again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ddsr_core.config import Runtime
from ddsr_core.errors import StorageError
from ddsr_core.pipeline import load_config
from ddsr_core.progress import silent
from ddsr_core.store import Store, write_json
from flows.building import plain_builder
from flows.claims import claimer, claiming, drop_claims
from flows.housekeeping import collect_garbage
from flows.runs import fail_run, run_folder, start_run
from tests.unit.toy_stage import TOY, CountConfig, inputs


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.touch()
    return path


def begin(store: Store, log: Path) -> None:
    start_run(store, "demo", load_config("demo", None, ()), log, None)


def removed(store: Store) -> list[str]:
    return [Path(place).name for place, _ in collect_garbage(store, delete=True)]


def test_run_that_goes_on_or_has_failed_keeps_what_it_has_built_and_used(tmp_path: Path, log: Path) -> None:
    store = Store(tmp_path / "home")
    used, _ = store.build(TOY, CountConfig(files=1), inputs(log), Runtime())  # by nobody that has a name
    unused, _ = store.build(TOY, CountConfig(files=2), inputs(log), Runtime())
    begin(store, log)
    build = claiming(plain_builder(store, "cpu", silent), claimer(store, "demo"))
    assert build(TOY, CountConfig(files=1), inputs(log))[1]
    built, _ = build(TOY, CountConfig(files=3), inputs(log))
    assert removed(store) == [unused.key]
    fail_run(store, "demo", "disk full")
    assert removed(store) == []
    drop_claims(store, "demo")
    assert sorted(removed(store)) == sorted([used.key, built.key])


def test_key_is_noted_before_the_stage_begins(tmp_path: Path, log: Path) -> None:
    store, config = Store(tmp_path / "home"), CountConfig()
    seen: list[str] = []

    def build(*_: object) -> None:
        seen.append((run_folder(store, "demo") / "claimed/keys.txt").read_text())
        raise StorageError("disk full")

    with pytest.raises(StorageError):
        claiming(build, claimer(store, "demo"))(TOY, config, inputs(log))  # type: ignore[arg-type]
    assert seen == [TOY.key(config, inputs(log)) + "\n"]


def test_run_that_is_begun_again_keeps_what_it_has_made_before(tmp_path: Path, log: Path) -> None:
    store = Store(tmp_path / "home")
    earlier, _ = store.build(TOY, CountConfig(), inputs(log), Runtime())
    begin(store, log)
    path = run_folder(store, "demo") / "run.json"
    write_json(path, {**json.loads(path.read_text()), "status": "completed", "stages": [{"key": earlier.key}]})
    begin(store, log)
    assert "stages" not in json.loads(path.read_text())
    assert removed(store) == []


def test_unfinished_stage_of_a_failed_run_is_kept_until_it_is_whole(tmp_path: Path, log: Path) -> None:
    store, config = Store(tmp_path / "home"), CountConfig()
    key = TOY.key(config, inputs(log))
    claimer(store, "demo")(key)
    partial = store.home / f"artifacts/toy/{key}.partial"
    partial.mkdir(parents=True)
    assert removed(store) == []
    store.build(TOY, config, inputs(log), Runtime())
    partial.mkdir(exist_ok=True)
    assert removed(store) == [partial.name]


def test_keys_are_noted_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    claimer(store, "demo")("a", "b", "a")
    claimer(store, "demo")("b", "c")  # another process
    assert (run_folder(store, "demo") / "claimed/keys.txt").read_text() == "a\nb\nc\n"
