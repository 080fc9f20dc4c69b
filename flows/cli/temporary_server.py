"""A Prefect server for one command, started before the Prefect client is imported.

Prefect starts one automatically if none is set up, but its client first imports the entire server, then waits while the
server process imports it again. Here that process (`flows.cli.server_process`) starts first, so that both import at
the same time.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ddsr_core.errors import DdsrError

STOP_S = 5.0
#: How much of what the server has printed is shown if it does not start.
LAST_LINES, MOST_COLUMNS = 5, 200
#: The folder that holds the package `flows`.
ROOT = Path(__file__).resolve().parents[2]
#: Settings files of Prefect that can name a server.
SETTINGS_FILES = ("prefect.toml", "pyproject.toml", ".env")
SERVER_SIGNS = ("PREFECT_API_URL", "[api]", "[tool.prefect.api]")


@dataclass(frozen=True)
class TemporaryServer:
    """A server that has been started and may not answer yet.

    Attributes:
        process: of the server.
        said: what it prints.
    """

    process: subprocess.Popen[bytes]
    said: BinaryIO

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            DdsrError: it has ended, or does not answer in time. The message has the last lines that it printed.
        """
        limit = float(os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"])
        try:
            urllib.request.urlopen(os.environ["PREFECT_API_URL"] + "/health", timeout=limit).close()  # nosec B310
        except OSError as error:
            with suppress(subprocess.TimeoutExpired):  # it closes its socket just before it ends
                self.process.wait(STOP_S)
            ended = self.process.poll()
            what = f"did not answer in {limit:.0f} s ({error})" if ended is None else f"ended with exit code {ended}"
            busy = "run again on a less busy machine, " if ended is None else ""
            raise DdsrError(
                f"Prefect's temporary server {what}{self.last_lines()}",
                where=f"PREFECT_HOME={os.environ.get('PREFECT_HOME', '~/.prefect')}",
                fix=f"{busy}start a server yourself (prefect server start) and set PREFECT_API_URL, or pass --no-prefect",
            ) from error

    def last_lines(self) -> str:
        """The last lines that it has printed, indented, after a colon; empty if there are none."""
        self.said.seek(0)
        lines = [line.rstrip() for line in self.said.read().decode(errors="replace").splitlines() if line.strip()]
        return "".join([":"] * bool(lines) + [f"\n    {line[:MOST_COLUMNS]}" for line in lines[-LAST_LINES:]])


def begin_server(home: Path) -> TemporaryServer | None:
    """Start a server and name it in $PREFECT_API_URL if none is set up. Call it before Prefect is imported.

    The server ends after everything else in this process.

    Args:
        home: of the runs; receives the data of Prefect if its own folder, $PREFECT_HOME, cannot be written.
    """
    if is_set_up():
        return None
    if not is_writable(prefect_home()):
        os.environ["PREFECT_HOME"] = str(home / "prefect")
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)  # early connections wait until the server listens
    descriptor = listening.fileno()
    # -P: ignore a package `flows` of the user in the working directory. PYTHONPATH: the code of this process.
    command = [sys.executable, "-P", "-m", "flows.cli.server_process", str(descriptor), str(os.getpid())]
    environment = {**os.environ, "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}  # as Prefect starts its own
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    said = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the server)
    process = subprocess.Popen(
        command, env=environment, pass_fds=[descriptor], stdout=said, stderr=said, start_new_session=True  # not for Ctrl-C
    )  # fmt: skip
    atexit.register(_stop, process)
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
    listening.close()
    return TemporaryServer(process, said)


def prefect_home() -> Path:
    """The folder of Prefect's own data."""
    return Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def names_server() -> bool:
    """Whether the user has set up a server: in the environment, in a profile of Prefect, or in a settings file."""
    return any(name in os.environ for name in ("PREFECT_API_URL", "PREFECT_PROFILE")) or _settings_say(SERVER_SIGNS)


def is_set_up() -> bool:
    """Whether the user has set up a server or forbidden a temporary one. Prefect then finds it automatically."""
    return names_server() or "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE" in os.environ or _settings_say(("ALLOW_EPHEMERAL",))


def _settings_say(signs: tuple[str, ...]) -> bool:
    files = [prefect_home() / "profiles.toml", *map(Path, SETTINGS_FILES)]
    return any(sign in path.read_text(errors="replace") for path in files if path.is_file() for sign in signs)
