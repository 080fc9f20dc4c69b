"""A crashed run is scheduled again by an automation (`ddsr deploy`); one that always crashes must come to an end."""

from __future__ import annotations

from prefect.runtime import flow_run

from ddsr_core.errors import DdsrError

MAX_ATTEMPTS = 10


def refuse_endless_crashes() -> None:
    """Fail the current flow run if it has begun more than `MAX_ATTEMPTS` times.

    Raises:
        DdsrError: it has.
    """
    count = flow_run.run_count or 0
    if count > MAX_ATTEMPTS:
        raise DdsrError(
            f"this run has begun {count} times and never ended",
            where=f"flow run {flow_run.name}",
            mend="see its log for what kills it (memory, mostly), and start a new run: finished stages are kept",
        )
