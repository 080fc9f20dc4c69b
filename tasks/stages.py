"""One Prefect task a stage. The cache key is the artifact key, the result is the small manifest (JSON, never pickle)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from prefect import Task, get_run_logger
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.concurrency.sync import concurrency
from prefect.context import TaskRunContext
from prefect.runtime import flow_run, task_run

from ddsr_core.baselines.crops import STAGE as CROPS
from ddsr_core.baselines.gsdd import STAGE as GSDD
from ddsr_core.baselines.subset import STAGE as SUBSET
from ddsr_core.config import Runtime, StageConfig, resolve_device
from ddsr_core.diffusion.class_rows import STAGE as CLASS_ROWS
from ddsr_core.diffusion.finetune import STAGE as FINETUNE
from ddsr_core.diffusion.latents import STAGE as LATENTS
from ddsr_core.errors import DdsrError, StorageError, UnreachableError
from ddsr_core.evaluation.evaluate import STAGE as EVALUATE
from ddsr_core.pseudo_labels.clusters import STAGE as CLUSTERS
from ddsr_core.pseudo_labels.embeddings import STAGE as EMBEDDINGS
from ddsr_core.pseudo_labels.patches import STAGE as PATCHES
from ddsr_core.sampling.sample import STAGE as SAMPLE
from ddsr_core.sr.train_sr import STAGE as TRAIN_SR
from ddsr_core.storage.remote_store import open_store, retry_while_unreachable
from ddsr_core.storage.store import Artifact, InputRef, Manifest, Stage, StageInput, Store
from tasks import progress
from tasks.cancelling import ending_when_cancelled
from tasks.gpu_pool import run_on_pool
from tasks.parts import spread_over
from tasks.recovery import retry_while_server_down
from tasks.run_pages import publish_stage
from tasks.task_runners import Runner

StageName = Literal[
    "patches", "embeddings", "clusters", "latents", "class_rows", "finetune", "sample", "crops", "subset", "gsdd",
    "train_sr", "evaluate",
]  # fmt: skip
#: Stages that want a GPU.
GPU_STAGES = frozenset({"embeddings", "latents", "finetune", "sample", "subset", "gsdd", "train_sr", "evaluate"})
#: The limit that `ddsr deploy` sets to the number of GPUs. Its slots are leases: a killed run gives its own back.
GPU_SLOTS = "ddsr-gpu"
#: Where GPU stages run: in the process that asks for them, or on the pool that `tasks.gpu_pool` sends them to.
Gpu = Literal["local", "pool"]


def _cache_key(context: TaskRunContext, parameters: dict[str, Any]) -> str | None:
    return str(parameters["key"])


def _is_worth_retrying(task: Any, run: Any, state: Any) -> bool:
    """Retry what a second try can fix (the disk, the network), never bad input or a loss that is not finite."""
    try:
        state.result()
    except UnreachableError:
        return True
    except DdsrError:
        return False
    except OSError:
        return True
    return False


def gpu_slot(device: str) -> AbstractContextManager[None]:
    """One of the slots of `GPU_SLOTS` while work goes on there; nothing on a CPU."""
    return concurrency(GPU_SLOTS) if device.startswith("cuda") else nullcontext()


def stage_task(stage: Stage) -> Task[..., Manifest]:
    """The task of a stage.

    Its runs have no tags: before a task with tags Prefect asks the server for a slot of each, a write that a busy SQLite
    refuses at first, and asks again after two seconds.
    """

    def run(
        key: str,
        config: dict[str, Any],
        inputs: dict[str, InputRef],
        home: str,
        device: str,
        config_class: str,
        photo_cache: str | None = None,
        runner: Runner = "sequential",
        workers: int = 1,
    ) -> Manifest:
        store = open_store(home)
        sources = {name: ref.source(store) for name, ref in inputs.items()}
        device = resolve_device(device)
        known = store.home / photo_cache if photo_cache else None
        runtime = Runtime(
            device=device, progress=progress.current.get(), run=flow_run.name or "", photo_cache=known,
            spread=spread_over(runner, workers, store, stage.name, device, on_gpu=stage.name in GPU_STAGES),
        )  # fmt: skip
        with gpu_slot(device):
            artifact, there = store.build(stage, _config(config_class, config), sources, runtime)
        logger = get_run_logger()
        logger.info(
            "%s %s: %s", stage.name, key, "there already" if there else f"built in {artifact.manifest.seconds:.0f} s"
        )
        publish_stage(artifact, task_run.name or stage.name, there)
        return artifact.manifest

    run.__doc__ = f"Build the `{stage.name}` artifact, or continue a build that was cut off."
    return Task(
        run,
        name=stage.name,
        cache_policy=CacheKeyFnPolicy(cache_key_fn=_cache_key),
        persist_result=True,
        result_serializer="json",
        retries=2,
        retry_delay_seconds=[5, 30],
        retry_condition_fn=_is_worth_retrying,
        version=str(stage.version),
    )


def _config(config_class: str, values: dict[str, Any]) -> StageConfig:
    """The config model again, from the plain values that Prefect passes and shows."""
    import importlib

    module, _, name = config_class.rpartition(".")
    model: type[StageConfig] = getattr(importlib.import_module(module), name)
    return model.model_validate(values)


TASKS: dict[str, Task[..., Manifest]] = {
    stage.name: stage_task(stage)
    for stage in (
        PATCHES,
        EMBEDDINGS,
        CLUSTERS,
        LATENTS,
        CLASS_ROWS,
        FINETUNE,
        SAMPLE,
        CROPS,
        SUBSET,
        GSDD,
        TRAIN_SR,
        EVALUATE,
    )
}


def run_task(stage: str, label: str, parameters: dict[str, Any], refresh: bool = False) -> Manifest:
    """Run a stage's task in this process, under the current flow run.

    Args:
        label: shown in the task run's name, such as the data source of an SR training.
        parameters: of the task.
        refresh: Prefect's cached manifest does not count, as its artifact is not whole.
    """
    name = f"{stage} {label}".strip()
    task = TASKS[stage].with_options(task_run_name=name, refresh_cache=refresh)
    with ending_when_cancelled():
        return retry_while_server_down(lambda: task(**parameters))


def build(
    store: Store,
    stage: Stage,
    config: StageConfig,
    inputs: Mapping[str, StageInput],
    device: str,
    label: str,
    gpu: Gpu = "local",
    photo_cache: str | None = None,
    runner: Runner = "sequential",
    workers: int = 1,
) -> tuple[Artifact, bool]:
    """Run the stage's task: Prefect's cached manifest counts only while the artifact is whole.

    Args:
        device: of the machine that runs the stage; auto takes a GPU where there is one.
        label: shown in the run's name.
        gpu: where a GPU stage runs that is not built yet.
        photo_cache: folder of a `ddsr_core.pseudo_labels.photo_cache`, relative to the home.
        runner: where parts of a stage that has parts are done; ``workers`` at once.

    Returns:
        The artifact, and whether it was there already.

    Raises:
        StorageError: the task has finished but its artifact is not in this home.
    """
    key = stage.key(config, inputs)
    before = retry_while_unreachable(lambda: store.find(stage.name, key))
    there = before is not None
    parameters: dict[str, Any] = {
        "key": key,
        "config": config.model_dump(mode="json"),
        "inputs": {name: InputRef.of(item) for name, item in inputs.items()},
        "home": store.url,
        "device": device,
        "config_class": f"{type(config).__module__}.{type(config).__name__}",
        "photo_cache": photo_cache,
    }
    here = {**parameters, "runner": runner, "workers": workers}
    if gpu == "pool" and stage.name in GPU_STAGES and not there:
        sent = {name: ref.model_dump(mode="json") for name, ref in parameters["inputs"].items()}
        run_on_pool(f"{stage.name} {label}".strip(), {**parameters, "inputs": sent, "stage": stage.name, "label": label})
    else:
        run_task(stage.name, label, here, refresh=not there)
    found = before or retry_while_unreachable(lambda: store.find(stage.name, key))
    if found is None:
        raise StorageError("the stage is done but its artifact is not here", where=store.folder(stage.name, key))
    return found, there
