"""The subflow that trains SR networks side by side, on the task runner that the run names."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from prefect import flow, task
from prefect.futures import wait
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from ddsr_core.errors import ConfigError, DdsrError
from ddsr_core.pipeline import PipelineConfig
from ddsr_core.sr import train
from ddsr_core.store import InputRef, StageInput, Store
from flows.chain import Ahead, NetworkToTrain
from flows.fan_out import FanOut, OneByOne, Runner, Together, Work, train_and_measure


@task(name="network", task_run_name="{work.label}", tags=["ddsr", "gpu"], persist_result=False)
def network(work: Work) -> None:
    """Train one SR network and measure it; what is there is left as it is."""
    train_and_measure(work)


@flow(name="networks", persist_result=False)
def networks(works: list[Work], runner: Runner) -> None:
    """Train and measure SR networks, as many at once as the task runner has room for.

    Args:
        works: one network each.
        runner: what this flow's task runner is.
    """
    on_gpu = any(work.device != "cpu" for work in works)
    with ray_resources(on_gpu) if runner == "ray" else nullcontext():
        futures = network.map(works)
    wait(futures)
    failed = [error for future in futures if (error := future.state.result(raise_on_failure=False)) is not None]
    if failed:
        first = failed[0]
        raise (
            first
            if isinstance(first, DdsrError)
            else DdsrError(
                f"{len(failed)} of {len(works)} networks failed: {first}", mend="retry: those that are done are kept"
            )
        ) from (first if isinstance(first, Exception) else None)


def prefect_fan_out(runner: Runner, workers: int) -> FanOut:
    """Cells on a task runner of the current flow run.

    Args:
        workers: at once; on a Ray cluster that is there already, as many as it has room for.

    Raises:
        ConfigError: prefect-ray is not installed.
    """
    if runner == "one by one":
        return OneByOne()
    on_runner = networks.with_options(task_runner=task_runner(runner, workers))
    return Together(lambda works: on_runner(works, runner))


def networks_ahead(store: Store, config: PipelineConfig, device: str, runner: Runner, workers: int) -> Ahead | None:
    """For `flows.chain.train_networks`: a run's networks on a task runner; None to train them one by one.

    Raises:
        ConfigError: prefect-ray is not installed.
    """
    if runner == "one by one":
        return None
    on_runner = networks.with_options(task_runner=task_runner(runner, workers))

    def ahead(cells: list[NetworkToTrain], tests: StageInput) -> None:
        on_runner([work_of(cell, tests) for cell in cells], runner)

    def work_of(cell: NetworkToTrain, tests: StageInput) -> Work:
        inputs = {"data": cell.images, **train.trunk_input(cell.recipe)}
        return Work(
            label=cell.label, home=store.url, device=device, recipe=cell.recipe, evaluate=config.evaluate,
            inputs={name: InputRef.of(item) for name, item in inputs.items()}, tests=InputRef.of(tests),
        )  # fmt: skip

    return ahead


def task_runner(runner: Runner, workers: int) -> TaskRunner[Any]:
    """Prefect's task runner of that name. Ray: the cluster that $RAY_ADDRESS names, else one of this machine."""
    if runner == "threads":
        return ThreadPoolTaskRunner(max_workers=workers)
    if runner == "processes":
        return ProcessPoolTaskRunner(max_workers=workers)
    try:
        from prefect_ray import RayTaskRunner
    except ImportError as error:
        raise ConfigError(
            "prefect-ray is not installed", where="runner", mend="install ddsr with the extra `ray`, here and on the cluster"
        ) from error
    import os

    return RayTaskRunner() if os.environ.get("RAY_ADDRESS") else RayTaskRunner(init_kwargs={"num_cpus": workers})


def ray_resources(on_gpu: bool) -> Any:
    """What Ray reserves for a network: a core, and a GPU where networks are trained on one."""
    from prefect_ray.context import remote_options

    return remote_options(num_cpus=1, num_gpus=1 if on_gpu else 0)
