"""Parts of a stage's work as mapped tasks: a `ddsr_core.parallel.Spread` on the task runner of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from prefect import get_run_logger, task

from ddsr_core.parallel import RunParts
from ddsr_core.pipeline.request import Runner
from ddsr_core.storage.stage import Stage
from ddsr_core.storage.store import Store
from tasks.task_runners import ray_resources, task_runner


@task(name="part", task_run_name="{stage}, part {number} of {total}", persist_result=False)
def part(do: Callable[[Any], None], work: Any, stage: str, number: int, total: int) -> None:
    """Compute one part of a stage. Its results are written to the folder of the build."""
    do(work)


def spread_over(runner: Runner, workers: int, store: Store, stage: Stage, device: str) -> RunParts | None:
    """How to compute parts of the current stage in other processes; None to compute all of it in this one.

    Args:
        store: its home must be a folder, so that several machines can work on one build.
        device: torch device of the parts, if the stage uses a GPU.
    """
    if runner == "sequential":
        return None
    if runner == "ray" and store.url != str(store.home):
        text = "%s: runs in one process, because Ray's machines share no folder if the home is on S3"
        get_run_logger().info(text, stage.name)
        return None
    if stage.on_gpu and device.startswith("cuda") and runner != "ray":
        return None  # one process keeps a GPU busy

    def run_parts(do: Callable[[Any], None], parts: Sequence[Any]) -> Iterator[None]:
        with task_runner(runner, min(workers, len(parts))) as at:
            with ray_resources(device if stage.on_gpu else "cpu") if runner == "ray" else nullcontext():
                places = [{"do": do, "work": work, "stage": stage.name, "number": i, "total": len(parts)}
                          for i, work in enumerate(parts, start=1)]  # fmt: skip
                futures = [at.submit(part, parameters) for parameters in places]
            for future in futures:
                future.result()
                yield

    return run_parts
