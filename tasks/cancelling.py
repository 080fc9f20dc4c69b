"""A run that is being cancelled ends, even where the worker that should end it has died or has lost the server.

Prefect leaves that to the worker. A worker that was killed leaves its runs behind, which nobody could cancel any more.
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

LOOK_SECONDS = 3.0
#: What the worker, if there is one, has to do it itself.
GRACE_SECONDS = 5.0


@contextmanager
def ending_when_cancelled() -> Iterator[None]:
    """Meanwhile, this process gets SIGTERM where its flow run is being cancelled and its worker does nothing about it.

    Only for runs of deployments: others end with Ctrl-C.
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
    """Whether the current flow run, ``run``, is of a deployment; the server is asked once a run, not once a stage."""
    return deployment.id is not None


def _watch(run: str, done: Event) -> None:
    since: float | None = None
    with get_client(sync_client=True) as client:
        while not done.wait(LOOK_SECONDS):
            try:
                state = client.read_flow_run(run).state  # type: ignore[arg-type]
            except httpx.HTTPError:  # the server is away: it is asked again
                continue
            if state is None or state.type != StateType.CANCELLING:
                since = None
                continue
            since = since or time.monotonic()
            if time.monotonic() - since >= GRACE_SECONDS:
                client.set_flow_run_state(run, Cancelled(message="its worker was not there to end it"), force=True)  # type: ignore[arg-type]
                os.kill(os.getpid(), signal.SIGTERM)
                return
