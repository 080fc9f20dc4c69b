"""A Prefect server for one command, where none is set up, begun before the client is imported.

Prefect starts one by itself, but the client imports the whole server to do so, and then waits while the server's own
process imports it once more. Here that process begins first, and client and server are imported side by side.

    python -m flows.cli.temporary_server FD PARENT      # what runs in that process
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

from ddsr_core.errors import DdsrError
from ddsr_core.parallel import end_with_parent

STOP_S = 5.0
#: The folder that holds the package `flows`.
ROOT = Path(__file__).resolve().parents[2]
#: A server that is set up is named in the environment or in one of these.
SETTINGS_FILES = ("prefect.toml", "pyproject.toml", ".env")
SERVER_SIGNS = ("PREFECT_API_URL", "[api]", "[tool.prefect.api]")


def begin_server() -> bool:
    """Begin a server and name it in $PREFECT_API_URL, where none is set up; before Prefect is imported.

    It ends after all else in this process, whatever Prefect still has to tell it then.

    Returns:
        Whether `wait_for_server` has something to wait for.
    """
    if is_set_up():
        return False
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)  # who connects early waits until the server is there
    descriptor = listening.fileno()
    # -P: a package `flows` in the working directory belongs to the user. PYTHONPATH: the code of this process.
    command = [sys.executable, "-P", "-m", "flows.cli.temporary_server", str(descriptor), str(os.getpid())]
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
    """Whether the user has set up a server or forbidden a temporary one. Prefect then finds it by itself."""
    return names_server() or "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE" in os.environ or _settings_say(("ALLOW_EPHEMERAL",))


def _settings_say(signs: tuple[str, ...]) -> bool:
    profiles = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser() / "profiles.toml"
    files = [profiles, *map(Path, SETTINGS_FILES)]
    return any(sign in path.read_text(errors="replace") for path in files if path.is_file() for sign in signs)


def wait_for_server() -> None:
    """Wait until the server of `begin_server` answers.

    Raises:
        DdsrError: it does not in time.
    """
    limit = float(os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"])
    try:
        urllib.request.urlopen(os.environ["PREFECT_API_URL"] + "/health", timeout=limit).close()
    except OSError as error:
        raise DdsrError(
            f"Prefect's temporary server did not start: {error}",
            fix="run again on a less busy machine, start a server (prefect server start) and set PREFECT_API_URL, "
            "or leave out --prefect",
        ) from error


def serve(descriptor: int, parent: int) -> None:
    """Be the server, on a socket that listens already, until told to stop or the command has ended."""
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    import uvicorn

    config = uvicorn.Config("prefect.server.api.server:create_app", factory=True, log_level="error", lifespan="on")
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=descriptor)])


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
