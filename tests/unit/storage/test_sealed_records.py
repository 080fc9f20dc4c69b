"""Records with a digest of themselves: what is damaged is not believed, and a home goes on without it where it can."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest

from ddsr_core.errors import InputError, StorageError
from ddsr_core.pipeline.pins import Pins, pinned_keys
from ddsr_core.pipeline.run_folder import list_runs, read_config, read_run
from ddsr_core.pipeline.run_state import begin_step
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.storage.files import sealed, unsealed
from ddsr_core.storage.store import Store

RECORD = {"name": "a", "numbers": [1, 2.5], "nothing": None, "text": "ä"}


def test_a_sealed_record_comes_back_and_one_of_an_earlier_version_is_believed() -> None:
    assert unsealed(json.dumps(sealed(RECORD)).encode(), "here", "fix") == RECORD
    assert unsealed(json.dumps(RECORD).encode(), "here", "fix") == RECORD
    assert sealed(sealed(RECORD)) == sealed(RECORD)


def test_no_flipped_bit_of_a_record_is_believed() -> None:
    text = json.dumps(sealed(RECORD)).encode()
    for at in range(len(text)):
        for bit in range(8):
            data = bytearray(text)
            data[at] ^= 1 << bit
            with suppress(StorageError):  # unless the name of the digest is what was flipped
                believed = unsealed(bytes(data), "here", "fix")
                assert {name: value for name, value in believed.items() if name in RECORD} == RECORD


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_record_is_one_message(data: bytes) -> None:
    with pytest.raises(StorageError, match="the file is damaged") as damaged:
        unsealed(data, "here", "fix")
    assert (damaged.value.where, damaged.value.fix) == ("here", "fix")


def test_a_damaged_run_is_listed_as_such_beside_the_others(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name in ("a", "b"):
        begin_step(store, name, TrainSRConfig(arch="edsr-small"), {})
    path = tmp_path / "runs/a/run.json"
    path.write_bytes(path.read_bytes().replace(b"running", b"runninG"))
    assert {state["name"]: state["status"] for state in list_runs(store)} == {"a": "damaged", "b": "running"}
    with pytest.raises(StorageError, match="damaged"):
        read_run(store, "a")
    with pytest.raises(InputError, match="runs here: a, b"):
        read_run(store, "c")


def test_the_record_of_another_run_is_not_believed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name in ("a", "b"):
        begin_step(store, name, TrainSRConfig(arch="edsr-small"), {})
    (tmp_path / "runs/a/run.json").write_bytes((tmp_path / "runs/b/run.json").read_bytes())
    with pytest.raises(StorageError, match="damaged"):
        read_run(store, "a")


def test_changed_settings_of_a_run_are_not_believed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    begin_step(store, "a", TrainSRConfig(arch="edsr-small", iterations=5), {})
    assert (read_config(store, "a")["iterations"], read_config(store, "a")["lr_patch_px"]) == (5, None)
    path = tmp_path / "runs/a/config.toml"
    path.write_text(path.read_text().replace("iterations = 5", "iterations = 7"))
    with pytest.raises(StorageError, match="settings of the run are missing or damaged"):
        read_config(store, "a")
    path.unlink()
    with pytest.raises(StorageError, match="settings of the run are missing or damaged"):
        read_config(store, "a")


def test_damaged_pins_are_one_message(tmp_path: Path) -> None:
    store = Store(tmp_path)
    begin_step(store, "a", TrainSRConfig(arch="edsr-small"), {})
    Pins(store, "a").add("0" * 32)
    assert pinned_keys(store) == {"0" * 32}
    (path,) = (tmp_path / "pins/a").iterdir()
    path.write_bytes(path.read_bytes().replace(b"0000", b"0001", 1))
    with pytest.raises(StorageError, match="damaged"):
        pinned_keys(store)
