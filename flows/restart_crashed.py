"""The restart-crashed flow reschedules crashed runs. An automation starts it at each crash, a schedule every five minutes.

Events are lost when a server dies, and arrive late or repeatedly if SQLite is busy. States are reliable, so automations only
start this flow, which then decides by the states. It imports nothing heavy and ends within seconds.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from uuid import UUID

from prefect import flow, get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterEndTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.runtime import deployment

from tasks.recovery import MAX_ATTEMPTS, restart

#: Runs that crashed longer ago are not restarted automatically.
MEMORY = timedelta(days=2)
PAUSE_SECONDS = 3.0
#: How long finished runs of this flow stay in the list.
RETENTION = timedelta(minutes=30)


@flow(name="restart-crashed", persist_result=False)
def restart_crashed() -> int:
    """Reschedule crashed runs, or end them if they were being cancelled. There is no need to start this flow yourself."""
    logger = get_run_logger()
    done = 0
    with get_client(sync_client=True) as client:
        while runs := [run for run in crashed(client) if run.run_count < MAX_ATTEMPTS]:
            for run in runs:
                logger.info("%s (%s), begun %d times: %s", run.name, run.id, run.run_count, restart(client, run))
                done += 1
            time.sleep(PAUSE_SECONDS)  # to catch runs that crash meanwhile: this flow never runs twice at once
        forget_old_runs(client)
    return done


def forget_old_runs(client: SyncPrefectClient) -> None:
    """Remove finished runs of this flow from the server: 288 per day would bury the runs that people look for."""
    if deployment.id is None:
        return
    old = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.COMPLETED, StateType.CANCELLED])),
            deployment_id=FlowRunFilterDeploymentId(any_=[UUID(deployment.id)]),
            end_time=FlowRunFilterEndTime(before_=datetime.now(UTC) - RETENTION),
        )
    )
    for run in old:
        client.delete_flow_run(run.id)


def crashed(client: SyncPrefectClient) -> list[FlowRun]:
    """Runs of our deployments that have crashed recently, except runs of this flow."""
    recent = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CRASHED])),
            tags=FlowRunFilterTags(all_=["ddsr"]),
            deployment_id=FlowRunFilterDeploymentId(is_null_=False),
            end_time=FlowRunFilterEndTime(after_=datetime.now(UTC) - MEMORY),
        )
    )
    return [run for run in recent if str(run.deployment_id) != deployment.id]
