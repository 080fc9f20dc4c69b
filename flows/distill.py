"""The distill flow: a folder of photos in, a distilled set, trained SR networks and a report out."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from ddsr_core.errors import DdsrError
from ddsr_core.pipeline import PipelineConfig, load_config
from ddsr_core.remote_store import Home, open_store
from ddsr_core.splits import hold_out
from flows.building import prefect_builder
from flows.chain import distill_and_train
from flows.runs import Outcome, fail_run, finish_run, run_log, start_run
from tasks.artifacts import publish
from tasks.attempts import refuse_endless_crashes
from tasks.stages import Gpu


@flow(name="distill")
def distill(
    images: Path,
    test: Path | None = None,
    preset: str = "demo",
    config: PipelineConfig | None = None,
    home: Home = "ddsr-home",
    run: str | None = None,
    device: str = "auto",
    gpu: Gpu = "here",
) -> Outcome:
    """Distill a folder of photos and compare SR networks trained on the result.

    Args:
        images: training photos: a folder, Parquet with an image column, or a glob pattern.
        test: test photos; without it one photo in ten is held out.
        preset: demo, released, paper or best; ignored where `config` is given.
        config: every stage's config.
        home: where artifacts and runs are kept: a folder or s3://bucket/prefix.
        run: name of the run below `home/runs`; the preset's name if not given.
        device: torch device; auto takes a GPU where there is one.
        gpu: where GPU stages run: here, or on the pool that `ddsr deploy` made for them.
    """
    refuse_endless_crashes()
    config = config or load_config(preset)
    store, name = open_store(home), run or config.preset
    if test is None and config.sr.archs:
        images, test = hold_out(images, store.home)
    start_run(store, name, config, images, test)
    try:
        chain = distill_and_train(config, images, test, prefect_builder(store, device, gpu), run_log(store, name))
    except DdsrError as error:
        fail_run(store, name, str(error))
        raise
    outcome = finish_run(store, name, config, chain)
    publish(name, outcome.table, outcome.report)
    return outcome
