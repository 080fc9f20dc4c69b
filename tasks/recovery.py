"""Recovery: a crashed run is scheduled again, and a run that loses the Prefect server waits for it."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.runtime import flow_run
from prefect.states import AwaitingRetry, Cancelled, Crashed, Failed

from ddsr_core.errors import DdsrError

T = TypeVar("T")
LOG = logging.getLogger("ddsr.recovery")
#: Attempts after which a run that keeps crashing fails.
MAX_ATTEMPTS = 10
#: Attempts of a run whose process exits with an error. A lost server may cause one such exit; a missing parameter repeats.
MAX_OWN_EXITS = 3
#: How long a run waits for a server that does not answer, in addition to the retries of Prefect's client.
OUTAGE_SECONDS, OUTAGE_POLL_SECONDS = 1800.0, 3.0


def refuse_endless_crashes() -> None:
    """Begin an attempt of the current flow run: end the tasks of earlier attempts, and fail after `MAX_ATTEMPTS`.

    Raises:
        DdsrError: the run has begun more often.
    """
    count = flow_run.run_count or 0
    if count > 1 and flow_run.id:
        with get_client(sync_client=True) as client:
            end_tasks(client, UUID(flow_run.id))
    if count > MAX_ATTEMPTS:
        raise DdsrError(
            f"this run has started {count} times and never finished",
            where=f"flow run {flow_run.name}",
            fix="find out from its log what kills it (often lack of memory), then start a new run; finished stages are kept",
        )


def is_own_exit(message: str) -> bool:
    """Whether the message of a crash says that the process exited with an error, as opposed to being killed."""
    found = re.search(r"status code:? (-?\d+)", message)
    return found is not None and int(found[1]) in (1, 2)


def end_tasks(client: SyncPrefectClient, run: UUID) -> int:
    """Mark tasks as crashed that a dead attempt left in the state running. Returns their number."""
    left = client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])),
        task_run_filter=TaskRunFilter(
            state=TaskRunFilterState(type=TaskRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING]))
        ),
    )
    for task in left:
        client.set_task_run_state(task.id, Crashed(message="the attempt that ran it has died"), force=True)
    return len(left)


def restart(client: SyncPrefectClient, run: FlowRun) -> str:
    """Schedule a crashed run again, or end it as cancelled if it died while it was being cancelled.

    Only a run that was killed, or that lost its worker or its server, is worth another attempt. A run whose process has
    exited with an error `MAX_OWN_EXITS` times fails. So does a run that has crashed `MAX_ATTEMPTS` times, started or not:
    Prefect counts only starts, and a pod that gets no node never starts.

    Returns:
        What was done: ``scheduled again``, ``cancelled`` or ``failed``.
    """
    states = sorted(client.read_flow_run_states(run.id), key=lambda state: state.timestamp)
    if sum(state.type == StateType.CRASHED for state in states) >= MAX_ATTEMPTS:
        client.set_flow_run_state(
            run.id, Failed(message=f"crashed {MAX_ATTEMPTS} times, including crashes before it started"), force=True
        )
        return "failed"
    own = [state.message for state in states if state.type == StateType.CRASHED and is_own_exit(state.message or "")]
    if len(own) >= MAX_OWN_EXITS:
        client.set_flow_run_state(
            run.id, Failed(message=f"its process exited with an error {len(own)} times: {own[-1]}"), force=True
        )
        return "failed"
    before = [state.type for state in states if state.type != StateType.CRASHED]
    if before and before[-1] in (StateType.CANCELLING, StateType.CANCELLED):
        client.set_flow_run_state(run.id, Cancelled(message="it died while it was being cancelled"), force=True)
        return "cancelled"
    client.set_flow_run_state(run.id, AwaitingRetry(message="crashed; continues from the last finished stage"))
    return "scheduled again"


def retry_while_server_down(call: Callable[[], T]) -> T:
    """Call a function, and repeat the call while the Prefect server cannot be reached. ``call`` must be safe to repeat.

    Raises:
        Exception: any other exception of ``call``, or an outage that lasts longer than `OUTAGE_SECONDS`.
    """
    since: float | None = None
    while True:
        try:
            return call()
        except Exception as error:
            since = since or time.monotonic()
            if not is_outage(error) or time.monotonic() - since > OUTAGE_SECONDS:
                raise
            LOG.warning("the Prefect server does not answer; waiting for it")
            time.sleep(OUTAGE_POLL_SECONDS)


def is_outage(error: BaseException) -> bool:
    """Whether an exception was caused by an unreachable or failing server, not by ddsr itself."""
    chain = list(_causes(error))
    return any(_is_of_outage(item) for item in chain) and not any(isinstance(item, DdsrError) for item in chain)


def _is_of_outage(error: BaseException) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500  # such as 503 while its database is locked
    return isinstance(error, httpx.TransportError)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
