"""The subflow that trains SR networks side by side, on the task runner that the run names."""

from __future__ import annotations

from contextlib import nullcontext

from prefect import flow, task, unmapped
from prefect.futures import wait

from ddsr_core.config import resolve_device
from ddsr_core.errors import DdsrError
from ddsr_core.pipeline.config import PipelineConfig
from ddsr_core.pipeline.fan_out import FanOut, OneByOne, Together, Work, train_and_measure
from ddsr_core.pipeline.pins import Pin
from ddsr_core.pipeline.stages import Ahead, TrainingJob
from ddsr_core.sr import train_sr
from ddsr_core.storage.store import InputRef, StageInput, Store
from tasks.stages import Gpu, gpu_slot
from tasks.task_runners import Runner, ray_resources, task_runner

#: Threads of a process share torch's random numbers: networks trained in them would not be those trained one by one.
SIDE_BY_SIDE = ("processes", "ray")


@task(name="network", task_run_name="{work.label}", persist_result=False)
def network(work: Work, runner: Runner) -> None:
    """Train one SR network and measure it; what is there is left as it is."""
    device = resolve_device(work.device)
    with gpu_slot(device) if runner != "ray" else nullcontext():  # Ray counts the GPUs of its machines itself
        train_and_measure(work.model_copy(update={"device": device}))


@flow(name="networks", persist_result=False)
def networks(works: list[Work], runner: Runner) -> None:
    """Train and measure SR networks, as many at once as the task runner has room for.

    Args:
        works: one network each, all on the same device.
        runner: what this flow's task runner is.
    """
    with ray_resources(works[0].device) if runner == "ray" else nullcontext():
        futures = network.map(works, unmapped(runner))
    wait(futures)
    failed = [error for future in futures if (error := future.state.result(raise_on_failure=False)) is not None]
    if failed:
        first = failed[0]
        raise (
            first
            if isinstance(first, DdsrError)
            else DdsrError(
                f"{len(failed)} of {len(works)} networks failed: {first}", fix="retry: those that are done are kept"
            )
        ) from (first if isinstance(first, Exception) else None)


def prefect_fan_out(runner: Runner, workers: int, gpu: Gpu = "local") -> FanOut:
    """Cells on a task runner of the current flow run.

    Args:
        workers: at once; on a Ray cluster that is there already, as many as it has room for.
        gpu: networks that go to the pool go there one by one, as they are trained in the run itself under ``threads``.

    Raises:
        ConfigError: prefect-ray is not installed, or there is no cluster where one should be.
    """
    if runner not in SIDE_BY_SIDE or gpu == "pool":
        return OneByOne()
    on_runner = networks.with_options(task_runner=task_runner(runner, workers))
    return Together(lambda works: on_runner(works, runner))


def networks_ahead(
    store: Store,
    config: PipelineConfig,
    device: str,
    runner: Runner,
    workers: int,
    gpu: Gpu = "local",
    pin: Pin = lambda *keys: None,
) -> Ahead | None:
    """For `ddsr_core.pipeline.stages.train_networks`: a run's networks on a task runner; None to train them one by one.

    Args:
        pin: told of the networks' keys before any is trained.

    Raises:
        ConfigError: as `prefect_fan_out`.
    """
    if runner not in SIDE_BY_SIDE or gpu == "pool":
        return None
    on_runner = networks.with_options(task_runner=task_runner(runner, workers))

    def ahead(cells: list[TrainingJob], tests: StageInput) -> None:
        pin(*(train_sr.STAGE.key(cell.recipe, inputs_of(cell)) for cell in cells))
        on_runner([work_of(cell, tests) for cell in cells], runner)

    def inputs_of(cell: TrainingJob) -> dict[str, StageInput]:
        return {"data": cell.images, **train_sr.trunk_input(cell.recipe)}

    def work_of(cell: TrainingJob, tests: StageInput) -> Work:
        return Work(
            label=cell.label, home=store.url, device=device, recipe=cell.recipe, evaluate=config.evaluate,
            inputs={name: InputRef.of(item) for name, item in inputs_of(cell).items()}, tests=InputRef.of(tests),
        )  # fmt: skip

    return ahead
