"""The two ways to build a stage: as a Prefect task, or directly. Same keys, same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ddsr_core.config import Runtime, StageConfig
from ddsr_core.pipeline.stages import Build
from ddsr_core.progress import ProgressFactory
from ddsr_core.storage.store import Artifact, Stage, StageInput, Store
from flows.cli.device import resolve_device_lazily

if TYPE_CHECKING:
    from tasks.stages import Gpu
    from tasks.task_runners import Runner


def plain_builder(
    store: Store, device: str, progress: ProgressFactory, run: str = "", photo_cache: str | None = None
) -> Build:
    """Stages run here and now; ``run`` is the name that others who wait for one see."""
    runtime = Runtime(device=resolve_device_lazily(device), progress=progress, run=run)
    knowing = replace(runtime, photo_cache=store.home / photo_cache if photo_cache else None)

    def build(stage: Stage, config: StageConfig, inputs: Mapping[str, StageInput], label: str = "") -> tuple[Artifact, bool]:
        return store.build(stage, config, inputs, knowing if stage.photo_cache else runtime)

    return build


def prefect_builder(
    store: Store,
    device: str,
    gpu: Gpu = "local",
    photo_cache: str | None = None,
    runner: Runner = "sequential",
    workers: int = 1,
) -> Build:
    """Stages run as tasks of the current flow run, or, those that want a GPU, on the pool for them.

    Args:
        runner: where parts of a stage that has parts are done; ``workers`` at once.
    """
    from tasks import stages

    where = device if gpu == "pool" else resolve_device_lazily(device)

    def build(stage: Stage, config: StageConfig, inputs: Mapping[str, StageInput], label: str = "") -> tuple[Artifact, bool]:
        known = photo_cache if stage.photo_cache else None
        return stages.build(store, stage, config, inputs, where, label, gpu, known, runner, workers)

    return build
