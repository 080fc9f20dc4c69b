"""`ddsr nightly`, `versions`, `rollback` and `gc` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ddsr_core.storage.store import Store
from flows.cli import running
from flows.cli.main import cli
from tests.helpers.fake_night import NAME, QUICK, Fakes, put, without_reports


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which one night has been spent."""
    without_reports(monkeypatch)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    Fakes().spend(Store(tmp_path / "home"), put(tmp_path / "photos", "a", "b"), put(tmp_path / "test", "t"))
    return tmp_path / "home"


def typed(home: Path, *words: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, [*words, "--home", str(home)])
    return done.exit_code, done.output


def night(home: Path, *words: str) -> tuple[int, str]:
    command = ["nightly", "--images", str(home.parent / "photos"), "--test", str(home.parent / "test"), "--name", NAME]
    for text in QUICK:
        command += ["--set", text]
    return typed(home, *command, "--warm-steps", "1", *words)


@pytest.mark.parametrize("more", [[], ["--prefect"], ["--no-prefect"]])
def test_where_nothing_has_changed_no_temporary_server_is_started(home: Path, more: list[str], monkeypatch):
    monkeypatch.setattr(running, "call_flow", lambda *_: pytest.fail("there is nothing to do"))
    assert night(home, *more) == (0, "**n**: nothing has changed since version 1. Active: version 1.\n\n")
    assert json.loads(night(home, "--json", *more)[1]) == {"version": None, "active_version": 1}


def test_where_something_has_changed_the_flow_gets_every_option(home: Path, monkeypatch):
    calls = []
    monkeypatch.setattr(running, "call_flow", lambda *given: calls.append(given) or {"text": "done"})
    put(home.parent / "photos", "c")
    assert night(home, "--margin", "0.5", "--cold", "--prefect") == (0, "done\n")
    [(entry, _, request)] = calls
    assert entry == "flows.nightly:nightly"
    assert (request.name, request.margin, request.warm, request.warm_steps) == (NAME, 0.5, False, 1)


def test_versions_and_rollback(home: Path):
    assert "*    1" in typed(home, "versions", "--name", NAME)[1]
    assert json.loads(typed(home, "versions", "--name", NAME, "--json")[1])["active"] == 1
    code, text = typed(home, "rollback", "--name", NAME)
    assert code == 1
    assert "no earlier version was active" in text
    assert "no versions of 'nobody'" in typed(home, "versions", "--name", "nobody")[1]


def test_wrong_names_and_missing_photos_are_one_message(home: Path, tmp_path: Path):
    code, text = typed(home, "nightly", "--images", "x", "--test", "y", "--name", "a/b")
    assert code == 1
    assert "cannot be the name of a series" in text
    code, text = typed(home, "nightly", "--images", str(tmp_path / "none"), "--test", str(tmp_path))
    assert code == 1
    assert "fix:" in text
