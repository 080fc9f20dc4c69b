"""Stages that run on the GPU work pool: the calling run waits for the stage, then reads its artifact from the home."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from ddsr_core.errors import ConfigError, DdsrError
from tasks.cancelling import ending_when_cancelled
from tasks.recovery import MAX_ATTEMPTS, restart, retry_while_server_down

#: The deployment of `flows.run_stage`, on the GPU work pool.
DEPLOYMENT = "stage/cuda"
POLL_SECONDS = 2.0
#: Seconds that `flows.restart_crashed` has to reschedule a crashed run before the run that waits for it does.
RESTART_SECONDS = 30.0


def run_on_pool(name: str, parameters: dict[str, Any]) -> None:
    """Run `flows.run_stage` on the pool and wait for it. If this run is stopped, the other one is cancelled.

    Raises:
        ConfigError: no deployment takes GPU stages.
        DdsrError: the run on the pool failed, crashed for good, or was cancelled.
    """
    with get_client(sync_client=True) as client:
        try:
            started = retry_while_server_down(
                lambda: run_deployment(DEPLOYMENT, parameters=parameters, flow_run_name=name, timeout=0)
            )
        except ObjectNotFound as error:
            raise ConfigError(
                "no deployment takes GPU stages", where=DEPLOYMENT, fix="run `ddsr deploy`, or set gpu=local"
            ) from error
        assert isinstance(started, FlowRun)  # run_deployment returns a coroutine only inside async code
        with ending_when_cancelled(), _cancelled_with_us(client, started.id):
            state = _final_state(client, started.id)
    if not state.is_completed():
        raise DdsrError(
            f"{name} ended as {state.name} on the pool: {state.message or 'no message'}",
            where=f"flow run {started.name} ({started.id})",
            fix="see the log of that run, fix the cause, and retry this run; finished stages are kept",
        )


@contextmanager
def _cancelled_with_us(client: SyncPrefectClient, run: UUID) -> Iterator[None]:
    try:
        yield
    except BaseException:  # usually a signal; nothing waits for that run any longer
        client.set_flow_run_state(run, Cancelling(message="the run that waited for it was stopped"))
        raise


def _final_state(client: SyncPrefectClient, run: UUID) -> State[Any]:
    """The final state of a run. `flows.restart_crashed` reschedules a crashed run; if it is too slow, this function does."""
    crashed_at: float | None = None
    while True:
        current = retry_while_server_down(lambda: client.read_flow_run(run))
        state = current.state
        if state is None or not state.is_final():
            crashed_at = None
        elif state.type != StateType.CRASHED or current.run_count >= MAX_ATTEMPTS:
            return state
        else:
            crashed_at = crashed_at or time.monotonic()
            if time.monotonic() - crashed_at > RESTART_SECONDS:
                retry_while_server_down(partial(restart, client, current))
        time.sleep(POLL_SECONDS)
