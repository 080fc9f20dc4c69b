"""The process of the temporary server imports ddsr's own packages, whatever lies in the working directory."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddsr_core.errors import DdsrError
from flows.cli import temporary_server
from flows.cli.temporary_server import TemporaryServer


def test_a_project_with_its_own_flows_does_not_hide_ddsrs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows/__init__.py").write_text("raise SystemExit('the user's own')")
    started: dict[str, Any] = {}

    def popen(command: list[str], **options: Any) -> SimpleNamespace:
        started.update(command=command, env=options["env"])
        return SimpleNamespace(terminate=lambda: None, wait=lambda *_: 0)

    monkeypatch.setattr(temporary_server, "is_set_up", lambda: False)
    monkeypatch.setattr(temporary_server.subprocess, "Popen", popen)
    monkeypatch.setitem(os.environ, "PREFECT_API_URL", "")  # is set by the call, and restored afterwards
    assert temporary_server.begin_server(tmp_path)
    monkeypatch.undo()

    python = started["command"][: started["command"].index("-m")]
    code = "import flows; print(flows.__file__)"
    command = [*python, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=started["env"], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).resolve() == temporary_server.ROOT / "flows/__init__.py"


def test_the_last_lines_of_a_server_that_dies_are_in_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setenv("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "20")
    code = "import sys; [print('line', i) for i in range(9)]; print('the database is full', file=sys.stderr); sys.exit(3)"
    said = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen([sys.executable, "-c", code], stdout=said, stderr=said)
    with pytest.raises(DdsrError) as died:
        TemporaryServer(process, said).wait()
    assert died.value.what.startswith("Prefect's temporary server ended with exit code 3:\n")
    assert {"the database is full", "line 8"} <= {line.strip() for line in died.value.what.splitlines()}
    assert "line 1" not in died.value.what
    assert "less busy" not in str(died.value.fix)


def test_prefect_s_data_lies_below_the_home_if_its_own_folder_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    started: list[dict[str, str]] = []

    def popen(command: list[str], **options: Any) -> SimpleNamespace:
        started.append(options["env"])
        return SimpleNamespace(terminate=lambda: None, wait=lambda *_: 0)

    monkeypatch.setattr(temporary_server, "is_set_up", lambda: False)
    monkeypatch.setattr(temporary_server.subprocess, "Popen", popen)
    monkeypatch.setenv("PREFECT_API_URL", "")
    for given, used in ((tmp_path / "file/prefect", tmp_path / "home/prefect"), (tmp_path / "own", tmp_path / "own")):
        monkeypatch.setenv("PREFECT_HOME", str(given))
        assert temporary_server.begin_server(tmp_path / "home")
        assert started[-1]["PREFECT_HOME"] == os.environ["PREFECT_HOME"] == str(used)
