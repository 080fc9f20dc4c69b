"""Ends a cancelled run even if its worker has died or has lost the server.

Prefect leaves cancelling to the worker. Without this module, nobody could cancel the runs of a worker that was killed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Event, Thread

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled

#: Seconds between two reads of the flow run's state.
LOOK_SECONDS = 3.0
#: Seconds that the worker, if there is one, has to end the run itself.
GRACE_SECONDS = 5.0


@contextmanager
def ending_when_cancelled() -> Iterator[None]:
    """Send SIGTERM to this process if its flow run is being cancelled and its worker does not end it.

    Only runs of deployments need this: other runs end with Ctrl-C.
    """
    if flow_run.id is None or not _is_deployed(flow_run.id):
        yield
        return
    done = Event()
    Thread(target=_watch, args=(flow_run.id, done), name="cancelling", daemon=True).start()
    try:
        yield
    finally:
        done.set()


@cache
def _is_deployed(run: str) -> bool:
    """Whether the current flow run, ``run``, belongs to a deployment. The server is asked once per run."""
    return deployment.id is not None


def _watch(run: str, done: Event) -> None:
    since: float | None = None
    with get_client(sync_client=True) as client:
        while not done.wait(LOOK_SECONDS):
            try:
                state = client.read_flow_run(run).state  # type: ignore[arg-type]
            except httpx.HTTPError:  # the server does not answer: ask again
                continue
            if state is None or state.type != StateType.CANCELLING:
                since = None
                continue
            since = since or time.monotonic()
            if time.monotonic() - since >= GRACE_SECONDS:
                client.set_flow_run_state(run, Cancelled(message="its worker did not end it in time"), force=True)  # type: ignore[arg-type]
                os.kill(os.getpid(), signal.SIGTERM)
                return
