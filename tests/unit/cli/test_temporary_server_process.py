"""The process of the temporary server imports ddsr's own packages, whatever lies in the working directory."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.cli import temporary_server


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
    assert temporary_server.begin_server()
    monkeypatch.undo()

    python = started["command"][: started["command"].index("-m")]
    code = "import flows; print(flows.__file__)"
    command = [*python, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=started["env"], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).resolve() == temporary_server.ROOT / "flows/__init__.py"
