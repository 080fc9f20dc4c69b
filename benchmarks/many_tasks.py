"""Mapped tasks that do nothing, run like the parts of a stage: a load test for the server's database.

PREFECT_API_URL=… python -m benchmarks.many_tasks [COUNT] [RUNNER] [WORKERS]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.runtime import flow_run

from ddsr_core.pseudo_labels import patches
from ddsr_core.storage.store import Store
from tasks.parts import spread_over

#: Seconds to wait for task runs, which reach the database as events shortly after they end.
RECORDED_S = 120.0


def do_nothing(part: int) -> None:
    """One part, without work."""


@flow(name="many-tasks", persist_result=False)
def many_tasks(count: int, runner: Any, workers: int) -> str:
    """Run ``count`` empty parts, ``workers`` at once; returns the flow run's id."""
    with tempfile.TemporaryDirectory() as home:
        spread = spread_over(runner, workers, Store(Path(home)), patches.STAGE, "cpu")
        assert spread is not None
        done = sum(1 for _ in spread(do_nothing, range(count)))
    assert done == count
    return str(flow_run.id)


def recorded(run: str, count: int) -> dict[str, int]:
    """Number of recorded task runs by state; waits until ``count`` of them are completed."""
    until, states = time.monotonic() + RECORDED_S, {}
    wanted = FlowRunFilter.model_validate({"id": {"any_": [run]}})
    with get_client(sync_client=True) as client:
        while time.monotonic() < until and states.get("COMPLETED", 0) < count:
            states = {}
            for start in range(0, count + 1, 200):
                for task_run in client.read_task_runs(flow_run_filter=wanted, offset=start, limit=200):
                    name = task_run.state_type.value if task_run.state_type else "none"
                    states[name] = states.get(name, 0) + 1
            time.sleep(0.2)
    return states


def main(count: int = 200, runner: str = "threads", workers: int = 8) -> None:
    """Print the seconds that the flow took, and the states of its task runs."""
    started = time.monotonic()
    run = many_tasks(count, runner, workers)
    seconds = time.monotonic() - started
    print(f"{seconds:.3f}", recorded(run, count))


if __name__ == "__main__":
    given = sys.argv[1:]
    main(*map(int, given[:1]), *given[1:2], *map(int, given[2:3]))
