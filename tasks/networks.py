"""SR networks of a run as mapped tasks, on the task runner of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

from prefect import task

from ddsr_core.config import resolve_device
from ddsr_core.errors import DdsrError
from ddsr_core.parallel import RunParts
from ddsr_core.pipeline.networks import NetworkJob
from ddsr_core.pipeline.request import Execution, Runner
from tasks.gpu_slots import gpu_slot
from tasks.task_runners import ray_resources, task_runner

#: Threads of a process share torch's random numbers: networks trained in them would differ from those trained in turn.
RUNNERS: tuple[Runner, ...] = ("processes", "ray")


@task(name="network", task_run_name="{job.label}", persist_result=False)
def network(train: Callable[[NetworkJob], None], job: NetworkJob, runner: Runner) -> None:
    """Train one SR network and measure it. Existing artifacts are reused."""
    device = resolve_device(job.device)
    with gpu_slot(device) if runner != "ray" else nullcontext():  # Ray counts the GPUs of its machines itself
        train(job.model_copy(update={"device": device}))


def networks_at_once(execution: Execution) -> RunParts | None:
    """A way to train many SR networks at once, under the current flow run; None to train them one after another.

    Networks for the GPU pool go there one after another, and so do those of the runner ``threads``.
    """
    if execution.runner not in RUNNERS or execution.gpu == "pool":
        return None

    def train_all(do: Callable[[NetworkJob], None], parts: Sequence[NetworkJob]) -> Iterator[None]:
        if not parts:
            return
        runner = execution.runner
        with task_runner(runner, min(execution.workers, len(parts))) as at:
            with ray_resources(parts[0].device) if runner == "ray" else nullcontext():
                futures = [at.submit(network, {"train": do, "job": job, "runner": runner}) for job in parts]
            failed = 0
            error: BaseException | None = None
            for future in futures:  # one network that fails does not stop the others
                future.wait()
                problem = future.state.result(raise_on_failure=False)
                if isinstance(problem, BaseException):
                    failed, error = failed + 1, error or problem
                elif error is None:
                    yield
        if isinstance(error, DdsrError):
            raise error
        if error is not None:
            what = f"{failed} of {len(parts)} networks failed: {error}"
            raise DdsrError(what, fix="retry; finished networks are kept") from error

    return train_all
