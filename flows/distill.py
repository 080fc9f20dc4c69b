"""The distill flow: a folder of photos in, a distilled set, trained SR networks and a report out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prefect import flow

from ddsr_core.config import StageConfig
from ddsr_core.pipeline import PipelineConfig
from ddsr_core.store import Artifact, Stage, StageInput, Store
from flows.chain import distill_and_train
from flows.device import resolve_device_lazily
from flows.runs import Outcome, finish_run, start_run
from tasks import stages
from tasks.artifacts import publish


@flow(name="distill", log_prints=False, validate_parameters=False)
def distill(config: PipelineConfig, images: Path, test: Path | None, home: Path, run: str, device: str = "auto") -> Outcome:
    """Distill ``images`` and compare SR networks trained on the result.

    Args:
        config: every stage's config.
        images: training photos.
        test: test photos.
        home: where artifacts and runs are kept.
        run: name of the run below ``home/runs``.
        device: torch device, ``auto`` for a GPU where there is one.
    """
    store = Store(home)
    where = resolve_device_lazily(device)

    def build(
        stage: Stage, settings: StageConfig, inputs: Mapping[str, StageInput], label: str = ""
    ) -> tuple[Artifact, bool]:
        return stages.build(store, stage, settings, inputs, where, label)

    start_run(store, run, config, images, test)
    chain = distill_and_train(config, images, test, build)
    outcome = finish_run(store, run, config, chain)
    publish(run, outcome.table, outcome.report)
    return outcome
