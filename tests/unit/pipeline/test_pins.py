"""What `ddsr gc` leaves to runs that go on, have failed, or are begun again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ddsr_core import gc
from ddsr_core.config import Runtime
from ddsr_core.errors import ConfigError, StorageError
from ddsr_core.gc import collect_garbage, used_keys
from ddsr_core.pipeline.config import load_config
from ddsr_core.pipeline.pins import Pins, pinned_keys
from ddsr_core.pipeline.plain import plain_backend
from ddsr_core.pipeline.request import Execution
from ddsr_core.pipeline.run_folder import run_folder
from ddsr_core.pipeline.run_state import fail_run, failure_noted, start_run
from ddsr_core.pipeline.stages import Backend
from ddsr_core.storage.files import sealed, write_json
from ddsr_core.storage.store import Store
from tests.helpers.toy_stage import TOY, CountConfig, inputs


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.touch()
    return path


def begin(store: Store, log: Path) -> None:
    store.check()  # marks the home
    start_run(store, "demo", load_config("demo", None, ()), log, None)


def state(store: Store) -> dict[str, object]:
    return dict(json.loads((run_folder(store, "demo") / "run.json").read_text()))


def complete(store: Store, *keys: str) -> None:
    facts = {**state(store), "status": "completed", "stages": [{"key": key} for key in keys]}
    facts = sealed({name: value for name, value in facts.items() if name != "kept"})
    write_json(run_folder(store, "demo") / "run.json", facts)


def removed(store: Store) -> list[str]:
    return [Path(item.place).name for item in collect_garbage(store, delete=True)]


def test_run_that_goes_on_or_has_failed_keeps_what_it_has_built_and_used(tmp_path: Path, log: Path) -> None:
    store = Store(tmp_path / "home")
    used, _ = store.build(TOY, CountConfig(files=1), inputs(log), Runtime())  # by nobody that has a name
    unused, _ = store.build(TOY, CountConfig(files=2), inputs(log), Runtime())
    begin(store, log)
    build = Pins(store, "demo").over(plain_backend(Execution(), store)).build
    assert build(TOY, CountConfig(files=1), inputs(log))[1]
    built, _ = build(TOY, CountConfig(files=3), inputs(log))
    assert removed(store) == [unused.key]
    fail_run(store, "demo", "disk full")
    assert removed(store) == []
    shutil.rmtree(run_folder(store, "demo"))  # how to let go of a run
    assert sorted(removed(store)) == sorted([used.key, built.key])


def test_key_is_noted_before_the_stage_begins(tmp_path: Path, log: Path) -> None:
    store, config = Store(tmp_path / "home"), CountConfig()
    begin(store, log)
    seen: list[set[str]] = []

    def build(*_: object) -> None:
        seen.append(pinned_keys(store))
        raise StorageError("disk full")

    with pytest.raises(StorageError):
        Pins(store, "demo").over(Backend(build, store.url)).build(TOY, config, inputs(log))  # type: ignore[arg-type]
    assert seen == [{TOY.key(config, inputs(log))}]


def test_run_that_is_begun_again_keeps_what_it_has_made_before(tmp_path: Path, log: Path) -> None:
    store = Store(tmp_path / "home")
    earlier, _ = store.build(TOY, CountConfig(), inputs(log), Runtime())
    begin(store, log)
    complete(store, earlier.key)
    begin(store, log)
    begin(store, log)  # and again
    assert "stages" not in state(store)
    assert removed(store) == []
    complete(store)
    assert removed(store) == [earlier.key]


def test_two_runs_of_one_name_do_not_take_away_each_others_pins(tmp_path: Path, log: Path) -> None:
    store = Store(tmp_path / "home")
    begin(store, log)
    first, second = Pins(store, "demo"), Pins(store, "demo")
    first.add("a", "b", "a")
    second.add("b", "c")
    complete(store, "a", "b")
    first.drop()
    assert used_keys(store) == {"a", "b", "c"}
    second.add("d")
    second.drop()
    second.drop()
    assert used_keys(store) == {"a", "b"}


def test_what_died_in_a_run_that_was_finished_later_is_forgotten_after_a_while(tmp_path: Path, log: Path) -> None:
    store = Store(tmp_path / "home")
    begin(store, log)
    dead = Pins(store, "demo")
    dead.add("a")
    text = json.loads((store.home / dead.name).read_text())
    write_json(store.home / dead.name, sealed({**text, "written": "2020-01-01T00:00:00+00:00"}))
    assert pinned_keys(store) == {"a"}
    complete(store)
    assert pinned_keys(store) == set()


def test_unfinished_stage_of_a_failed_run_is_kept_until_it_is_whole(tmp_path: Path, log: Path) -> None:
    store, config = Store(tmp_path / "home"), CountConfig()
    key = TOY.key(config, inputs(log))
    begin(store, log)
    Pins(store, "demo").add(key)
    partial = store.home / f"artifacts/toy/{key}.partial"
    partial.mkdir(parents=True)
    assert removed(store) == []
    store.build(TOY, config, inputs(log), Runtime())
    partial.mkdir(exist_ok=True)
    assert removed(store) == [partial.name]


def test_run_that_is_finished_or_begun_while_gc_looks_loses_nothing(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "home")
    built, _ = store.build(TOY, CountConfig(files=1), inputs(log), Runtime())
    found, _ = store.build(TOY, CountConfig(files=2), inputs(log), Runtime())
    begin(store, log)
    pins = Pins(store, "demo")
    pins.add(built.key)
    run_names, held = gc.run_names, gc._collect_local

    def finish_first(store: Store) -> list[str]:
        complete(store, built.key)
        pins.drop()
        return run_names(store)

    def begin_first(*arguments: object) -> object:
        Pins(store, "demo").add(found.key)
        return held(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(gc, "run_names", finish_first)
    monkeypatch.setattr(gc, "_collect_local", begin_first)
    assert removed(store) == []


@contextmanager
def ends_with(error: BaseException) -> Iterator[None]:
    with pytest.raises(type(error)):
        yield


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError("no memory"), "failed"), (ConfigError("wrong"), "failed"), (SystemExit(1), "cancelled"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)  # fmt: skip
def test_whatever_stops_a_run_is_noted(tmp_path: Path, log: Path, error: BaseException, status: str) -> None:
    store = Store(tmp_path / "home")
    begin(store, log)
    with ends_with(error), failure_noted(store, "demo"):
        raise error
    assert state(store)["status"] == status


def test_finished_run_that_cannot_begin_again_stays_finished(tmp_path: Path, log: Path) -> None:
    store = Store(tmp_path / "home")
    begin(store, log)
    complete(store, "a")
    with ends_with(ConfigError("")), failure_noted(store, "demo"):
        raise ConfigError("no cluster")
    assert state(store)["status"] == "completed"


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc", "a*", "v[1]", "a\n"])
def test_names_that_no_run_can_have(tmp_path: Path, log: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a run"):
        start_run(Store(tmp_path / "home"), name, load_config("demo", None, ()), log, None)
