"""200 mapped tasks on a server of its own: all of them recorded, and no database error, on SQLite and on PostgreSQL."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.servers import postgres_folder, postgres_server, prefect_server
from tests.helpers.commands import ROOT

pytestmark = pytest.mark.slow
COUNT = 200


def check(folder: Path, database: str | None = None) -> None:
    with prefect_server(folder, database) as server:
        environment = {**os.environ, "PREFECT_HOME": str(folder), "PREFECT_API_URL": server.url, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "benchmarks.many_tasks", str(COUNT)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        assert f"{{'COMPLETED': {COUNT}}}" in done.stdout, done.stdout
        assert server.database_errors() == 0, server.log.read_text()[-4000:]


def test_sqlite(tmp_path: Path):
    check(tmp_path)


@pytest.mark.skipif(postgres_folder() is None, reason="PostgreSQL's server is not installed (apt-get install postgresql)")
def test_postgresql(tmp_path: Path):
    with postgres_server() as url:
        check(tmp_path, url)


def test_a_server_whose_database_fails_is_counted(tmp_path: Path):
    from benchmarks.servers import PrefectServer

    log = tmp_path / "log"
    log.write_text("started\nsqlalchemy.exc.OperationalError: (sqlite3.OperationalError) database is locked\nok\n")
    assert PrefectServer("", log).database_errors() == 1
