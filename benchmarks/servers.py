"""Context managers for a Prefect server and for its PostgreSQL database."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_S = 300.0
#: Signs in the log of a server whose database does not keep up.
DATABASE_ERRORS = (
    "OperationalError",
    "database is locked",
    "DBAPIError",
    "QueuePool limit",
    "TooManyConnections",
    "asyncpg.exc",
)


@dataclass(frozen=True)
class PrefectServer:
    """A running server: ``url`` of its API and its ``log`` file."""

    url: str
    log: Path

    def database_errors(self) -> int:
        """Number of log lines that report a database error."""
        return sum(any(sign in line for sign in DATABASE_ERRORS) for line in self.log.read_text().splitlines())


def free_port() -> int:
    """An unused port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def prefect_server(folder: Path, database: str | None = None, port: int | None = None) -> Iterator[PrefectServer]:
    """`prefect server start` with its own PREFECT_HOME.

    Args:
        folder: PREFECT_HOME; with SQLite it also holds the database.
        database: connection URL; None: SQLite.
        port: port of the API; None: any free port.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, log = port or free_port(), folder / "server.log"
    environment = {
        **os.environ, "PREFECT_HOME": str(folder), "PREFECT_SERVER_UI_ENABLED": "false", "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }  # fmt: skip
    if database:
        environment["PREFECT_API_DATABASE_CONNECTION_URL"] = database
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}/api"
        _wait_until_healthy(url, process, log)
        yield PrefectServer(url, log)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_S
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=10).close()
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"The Prefect server has not started: {log.read_text()[-2000:]}") from error
        time.sleep(0.1)


def postgres_folder() -> Path | None:
    """Folder of PostgreSQL's server programs; None if they are not installed."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    initdb = str(versions[-1]) if versions else shutil.which("initdb")
    return Path(initdb).resolve().parent if initdb else None


@contextmanager
def postgres_server(port: int | None = None) -> Iterator[str]:
    """A PostgreSQL cluster in a temporary folder; yields its connection URL for Prefect.

    PostgreSQL refuses to run as root; root starts it as the user ``postgres`` of Debian's package.

    Raises:
        RuntimeError: PostgreSQL is not installed or does not start.
    """
    programs = postgres_folder()
    if programs is None:
        raise RuntimeError("PostgreSQL is not installed; on Debian: apt-get install postgresql")
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    port, folder = port or free_port(), Path(tempfile.mkdtemp(prefix="ddsr-postgres-"))
    if user:
        shutil.chown(folder, "postgres")

    def run(program: str, *arguments: str) -> None:
        command = [*user, str(programs / program), "-D", str(folder / "data"), *arguments]
        done = subprocess.run(
            command,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{program} failed: {done.stderr}")

    try:
        run("initdb", "--username=prefect", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8")
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
        run("pg_ctl", "start", "--wait", f"--timeout={START_S:.0f}", f"--log={folder}/log", f"--options={options}")
        try:
            yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "stop", "--mode=fast", "--wait")
    finally:
        shutil.rmtree(folder)
