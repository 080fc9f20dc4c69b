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
import urllib.request
from pathlib import Path

from ddsr_core.errors import DdsrError

STOP_S = 5.0
#: The folder that holds the package `flows`.
ROOT = Path(__file__).resolve().parents[2]
#: Settings files of Prefect that can name a server.
SETTINGS_FILES = ("prefect.toml", "pyproject.toml", ".env")
SERVER_SIGNS = ("PREFECT_API_URL", "[api]", "[tool.prefect.api]")


def begin_server() -> bool:
    """Start a server and name it in $PREFECT_API_URL if none is set up. Call it before Prefect is imported.

    The server ends after everything else in this process.

    Returns:
        Whether a server was started, for `wait_for_server` to wait for.
    """
    if is_set_up():
        return False
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)  # early connections wait until the server listens
    descriptor = listening.fileno()
    # -P: ignore a package `flows` of the user in the working directory. PYTHONPATH: the code of this process.
    command = [sys.executable, "-P", "-m", "flows.cli.server_process", str(descriptor), str(os.getpid())]
    environment = {**os.environ, "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}  # as Prefect starts its own
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(command, env=environment, pass_fds=[descriptor], start_new_session=True)  # not for Ctrl-C
    atexit.register(_stop, process)
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
    listening.close()
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
    profiles = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser() / "profiles.toml"
    files = [profiles, *map(Path, SETTINGS_FILES)]
    return any(sign in path.read_text(errors="replace") for path in files if path.is_file() for sign in signs)


def wait_for_server() -> None:
    """Wait until the server of `begin_server` answers.

    Raises:
        DdsrError: it does not answer in time.
    """
    limit = float(os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"])
    try:
        urllib.request.urlopen(os.environ["PREFECT_API_URL"] + "/health", timeout=limit).close()
    except OSError as error:
        raise DdsrError(
            f"Prefect's temporary server did not start: {error}",
            fix="Run again on a less busy machine, start a server (prefect server start) and set PREFECT_API_URL, "
            "or leave out --prefect.",
        ) from error
