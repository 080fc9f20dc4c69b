"""One Prefect task per stage. Its cache key is the artifact key, and its result the small manifest (JSON, never pickle)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import Task, get_run_logger
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.context import TaskRunContext
from prefect.runtime import flow_run, task_run

from ddsr_core.config import Runtime, StageConfig, resolve_device
from ddsr_core.errors import DdsrError, StorageError, UnreachableError
from ddsr_core.pipeline.request import Execution, Runner
from ddsr_core.reporters import Tracking, tracked
from ddsr_core.stages import STAGES, find_stage
from ddsr_core.storage.remote_store import open_store, retry_while_unreachable
from ddsr_core.storage.stage import Artifact, Manifest, Stage, StageInput
from ddsr_core.storage.store import InputRef, Store
from tasks import progress
from tasks.cancelling import ending_when_cancelled
from tasks.gpu_pool import run_on_pool
from tasks.gpu_slots import gpu_slot
from tasks.parts import spread_over
from tasks.recovery import retry_while_server_down
from tasks.run_pages import publish_stage


def _cache_key(context: TaskRunContext, parameters: dict[str, Any]) -> str | None:
    return str(parameters["key"])


def _is_worth_retrying(task: Any, run: Any, state: Any) -> bool:
    """Retry only errors that a second attempt can fix (disk, network), never bad input or a loss that is not finite."""
    try:
        state.result()
    except UnreachableError:
        return True
    except DdsrError:
        return False
    except OSError:
        return True
    return False


def stage_task(stage: Stage) -> Task[..., Manifest]:
    """The task of a stage.

    Its runs have no tags: for each tag, Prefect requests a concurrency slot before the task starts. A busy SQLite database
    rejects that write, and Prefect retries only after two seconds.
    """

    def run(
        key: str,
        config: dict[str, Any],
        inputs: dict[str, InputRef],
        home: str,
        device: str,
        photo_cache: str | None = None,
        runner: Runner = "sequential",
        workers: int = 1,
        tracking: Tracking | None = None,
    ) -> Manifest:
        store = open_store(home)
        sources = {name: ref.source(store) for name, ref in inputs.items()}
        device = resolve_device(device)
        known = store.home / photo_cache if photo_cache else None
        runtime = Runtime(
            device=device, progress=progress.current.get(), run=flow_run.name or "", photo_cache=known,
            run_parts=spread_over(runner, workers, store, stage, device), reporter=tracked(tracking, store.home),
        )  # fmt: skip
        with gpu_slot(device):
            artifact, cached = store.build(stage, stage.config.model_validate(config), sources, runtime)
        verdict = "found in the cache" if cached else f"built in {artifact.manifest.seconds:.0f} s"
        get_run_logger().info("%s %s: %s", stage.name, key, verdict)
        publish_stage(artifact, task_run.name or stage.name, cached)
        return artifact.manifest

    run.__doc__ = f"Build the `{stage.name}` artifact, or resume an interrupted build."
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


#: Stage name -> its task.
TASKS: Mapping[str, Task[..., Manifest]] = {name: stage_task(stage) for name, stage in STAGES.items()}


def run_task(stage: str, label: str, parameters: dict[str, Any], refresh: bool = False) -> Manifest:
    """Run a stage's task in this process, under the current flow run.

    Args:
        label: shown in the task run's name, such as the training set of an SR network.
        parameters: of the task.
        refresh: ignore the manifest that Prefect has cached, because the artifact is missing or damaged.

    Raises:
        ConfigError: there is no such stage.
    """
    name = f"{stage} {label}".strip()
    task = TASKS[find_stage(stage).name].with_options(task_run_name=name, refresh_cache=refresh)
    with ending_when_cancelled():
        return retry_while_server_down(lambda: task(**parameters))


def build_stage(
    store: Store,
    stage: Stage,
    config: StageConfig,
    inputs: Mapping[str, StageInput],
    execution: Execution,
    label: str = "",
    photo_cache: str | None = None,
) -> tuple[Artifact, bool]:
    """Run a stage's task. The manifest that Prefect has cached counts only while the artifact is complete.

    Args:
        execution: its device is that of the machine that runs the stage. With ``gpu="pool"``, GPU stages that are not built
            yet are sent to the pool.
        label: shown in the run's name.
        photo_cache: folder of a `ddsr_core.pseudo_labels.photo_cache`, relative to the home.

    Returns:
        The artifact, and whether it already existed.

    Raises:
        StorageError: the task has finished but its artifact is not in this home.
    """
    key = stage.key(config, inputs)
    before = retry_while_unreachable(lambda: store.find(stage.name, key))
    tracking = execution.tracking(label or stage.name, key)
    parameters: dict[str, Any] = {
        "key": key,
        "config": config.model_dump(mode="json"),
        "inputs": {name: InputRef.of(item) for name, item in inputs.items()},
        "home": store.url,
        "device": execution.device,
        "photo_cache": photo_cache,
        "tracking": tracking,
    }
    if execution.gpu == "pool" and stage.on_gpu and before is None:
        sent = {name: ref.model_dump(mode="json") for name, ref in parameters["inputs"].items()}
        more = {"stage": stage.name, "label": label, "tracking": tracking.model_dump() if tracking else None}
        run_on_pool(f"{stage.name} {label}".strip(), {**parameters, "inputs": sent, **more})
    else:
        here = {**parameters, "runner": execution.runner, "workers": execution.workers}
        run_task(stage.name, label, here, refresh=before is None)
    artifact = before or retry_while_unreachable(lambda: store.find(stage.name, key))
    if artifact is None:
        raise StorageError(
            "the stage has finished, but its artifact is not in this home", where=store.folder(stage.name, key)
        )
    return artifact, before is not None
