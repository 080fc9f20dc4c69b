"""What makes runs survive: a crashed run is scheduled again, and a run that loses the Prefect server waits for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.runtime import flow_run
from prefect.states import AwaitingRetry, Cancelled, Failed

from ddsr_core.errors import DdsrError

T = TypeVar("T")
LOG = logging.getLogger("ddsr.recovery")
#: A run that always crashes must come to an end.
MAX_ATTEMPTS = 10
#: How long a run waits for a server that does not answer, beyond what Prefect's client waits.
OUTAGE_SECONDS, OUTAGE_POLL_SECONDS = 1800.0, 3.0


def refuse_endless_crashes() -> None:
    """Fail the current flow run if it has begun more than `MAX_ATTEMPTS` times.

    Raises:
        DdsrError: it has begun more often.
    """
    count = flow_run.run_count or 0
    if count > MAX_ATTEMPTS:
        raise DdsrError(
            f"this run has begun {count} times and never ended",
            where=f"flow run {flow_run.name}",
            fix="see its log for what kills it (often memory), and start a new run: finished stages are kept",
        )


def restart(client: SyncPrefectClient, run: FlowRun) -> str:
    """Schedule a crashed run again, or end it as cancelled if it died while it was being cancelled.

    A run that has crashed `MAX_ATTEMPTS` times fails, whether it had begun or not: Prefect counts only beginnings, and a pod
    that gets no node never begins.

    Returns:
        What was done: ``scheduled again``, ``cancelled`` or ``failed``.
    """
    states = sorted(client.read_flow_run_states(run.id), key=lambda state: state.timestamp)
    if sum(state.type == StateType.CRASHED for state in states) >= MAX_ATTEMPTS:
        client.set_flow_run_state(run.id, Failed(message=f"crashed {MAX_ATTEMPTS} times, also before it began"), force=True)
        return "failed"
    before = [state.type for state in states if state.type != StateType.CRASHED]
    if before and before[-1] in (StateType.CANCELLING, StateType.CANCELLED):
        client.set_flow_run_state(run.id, Cancelled(message="it died while it was being cancelled"), force=True)
        return "cancelled"
    client.set_flow_run_state(run.id, AwaitingRetry(message="crashed: it continues where it stopped"))
    return "scheduled again"


def retry_while_server_down(call: Callable[[], T]) -> T:
    """Call; if the Prefect server cannot be reached, call again until it can. ``call`` must be safe to repeat.

    Raises:
        Exception: whatever else ``call`` raises, and an outage that lasts longer than `OUTAGE_SECONDS`.
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
    """Whether an exception was caused by a server that could not be reached or could not answer, not by our own work."""
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
