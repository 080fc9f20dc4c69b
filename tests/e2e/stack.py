"""A Prefect server and workers as processes of this machine, for the tests here and for `kills.py`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.helpers.commands import ROOT

START_S, POLL_S, BUSY_S = 240.0, 0.3, 30.0
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Stack:
    """Server, workers and their database below a folder, on a free port of the loopback.

    Args:
        folder: for PREFECT_HOME and the logs.
        port: of the server; a free one if not given.
    """

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self.folder, self.port = folder, port or free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self.ui = f"http://127.0.0.1:{self.port}"
        self.api = httpx.Client(base_url=f"{self.ui}/api", timeout=60)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": f"{self.ui}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": "1",
        }

    def prefect(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "prefect", *arguments]

    def start(self, name: str, command: list[str], **environment: str) -> None:
        """Start a process in a session of its own; its output goes to ``<name>.log``."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, cwd=ROOT, env={**self.environment, **environment}, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def start_server(self) -> None:
        """Start the server, and wait until it answers."""
        self.start("server", self.prefect("server", "start", "--host", "127.0.0.1", "--port", str(self.port)))
        ends = time.monotonic() + START_S
        while time.monotonic() < ends:
            assert self.processes["server"].poll() is None, self.log("server")
            try:
                if self.api.get("health").is_success:
                    return
            except httpx.TransportError:
                pass  # not yet
            time.sleep(POLL_S)
        raise TimeoutError(self.log("server"))

    def start_worker(self, pool: str, *options: str, **environment: str) -> None:
        """Start a worker, with variables of its own, as on another machine.

        Its type is named: without it, a worker that meets no server gives up at once.
        """
        command = self.prefect("worker", "start", "--type", "process", "--pool", pool, "--name", f"of-{pool}", *options)
        self.start(f"worker-{pool}", command, **environment)

    def kill(self, name: str) -> None:
        """SIGKILL to one process; those that it has started live on."""
        self.processes[name].kill()
        self.processes.pop(name).wait()

    def stop(self) -> None:
        """End every process, and every one that those have started."""
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in self.flow_processes():
            kill_quietly(pid)
        self.api.close()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-4000:]

    def ddsr(self, *arguments: str) -> str:
        """Run the command ``ddsr`` against the server; its output."""
        command = [sys.executable, "-m", "flows.cli.main", *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def restart_every_minute(self) -> None:
        """Crashes whose news get lost are found after a minute then, not after five."""
        deployed = self.answer("GET", "deployments/name/restart-crashed/restart-crashed")
        (schedule,) = deployed["schedules"]
        body = {"schedule": {"cron": "* * * * *", "timezone": "UTC"}}
        self.answer("PATCH", f"deployments/{deployed['id']}/schedules/{schedule['id']}", body)

    def begin(self, deployment: str, parameters: dict[str, Any]) -> str:
        """Schedule a run of ``flow/deployment`` now; its id."""
        there = self.answer("GET", f"deployments/name/{deployment}")
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return str(self.answer("POST", f"deployments/{there['id']}/create_flow_run", body)["id"])

    def run(self, flow_run: str) -> dict[str, Any]:
        """A flow run as the server knows it."""
        return dict(self.answer("GET", f"flow_runs/{flow_run}"))

    def states(self, flow_run: str) -> list[str]:
        """The names of the states that a run has been in, in order."""
        states = self.answer("GET", f"flow_run_states/?flow_run_id={flow_run}")
        return [item["name"] for item in sorted(states, key=lambda item: item["timestamp"])]

    def filter(self, what: str, **filters: Any) -> list[dict[str, Any]]:
        """``what`` (flow_runs, task_runs, artifacts, logs …) that the filters let through."""
        return list(self.answer("POST", f"{what}/filter", filters))

    def answer(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        ends = time.monotonic() + BUSY_S
        while (response := self.api.request(method, path, json=body)).status_code == 503 and time.monotonic() < ends:
            time.sleep(POLL_S)  # SQLite is busy; Prefect's client asks again, too
        assert response.is_success, f"{method} {path}: {response.status_code} {response.text}"
        return response.json() if response.content else None

    def wait(self, flow_run: str, *wanted: str, timeout: float = 400) -> dict[str, Any]:
        """The run once its state's type is one of ``wanted`` (none: any final one). Outages of the server are sat out."""
        ends = time.monotonic() + timeout
        there: dict[str, Any] = {}
        while time.monotonic() < ends:
            try:
                there = self.run(flow_run)
            except httpx.TransportError:
                pass
            else:
                if there["state_type"] in (wanted or FINAL):
                    return there
            time.sleep(POLL_S)
        raise TimeoutError(f"after {timeout:.0f} s the run is {there.get('state_name')}: {there.get('state')}")

    def flow_processes(self, **environment: str) -> list[int]:
        """The processes that execute flow runs of this server, by their environment; those with these variables only."""
        wanted = {"PREFECT_HOME": str(self.folder / "prefect"), **environment}
        marks = {f"{name}={value}".encode() for name, value in wanted.items()}
        return [pid for pid, words, variables in processes() if marks <= set(variables) and b"prefect.engine" in words]


def processes() -> Iterator[tuple[int, list[bytes], list[bytes]]]:
    """Process id, command line and environment of every process that we may look at."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile, or another user's
            continue
        yield int(folder.name), words, variables


def kill_quietly(pid: int) -> bool:
    """SIGKILL; whether the process was still there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
