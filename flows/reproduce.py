"""The reproduce flow: experiments on the method, as tasks that other runs can share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from ddsr_core.experiments.names import DEFAULT_PRESET, ExperimentName
from ddsr_core.experiments.names import ProtocolName as Scale
from ddsr_core.experiments.paper_tables import design_of
from ddsr_core.experiments.run import finish, measure
from ddsr_core.pipeline.config import PipelineConfig, Preset, chosen_config
from ddsr_core.pipeline.runs import check_run_name, failure_noted, run_log
from ddsr_core.storage.remote_store import Home, open_store
from flows.building import prefect_builder
from flows.train_networks import prefect_fan_out
from tasks.recovery import refuse_endless_crashes
from tasks.stages import Gpu
from tasks.task_runners import AtLeastOne, Runner


@flow(name="reproduce")
def reproduce(
    images: Path,
    test: Path,
    experiment: ExperimentName = "ablation",
    scale: Scale = "mini",
    preset: Preset | None = None,
    config: PipelineConfig | None = None,
    seeds: AtLeastOne = 3,
    runner: Runner = "sequential",
    workers: AtLeastOne = 2,
    home: Home = "ddsr-home",
    run: str | None = None,
    device: str = "auto",
    gpu: Gpu = "local",
    overrides: tuple[str, ...] = (),
    command: str = "the flow `reproduce`",
) -> dict[str, Any]:
    """Measure the parts of the method, or its tables, seed by seed.

    Args:
        images: training photos: a folder, Parquet with an image column, or a glob pattern.
        test: test photos.
        experiment: what is measured.
        scale: mini for small networks and few images; paper for the paper's networks and numbers.
        preset: demo, released, paper or best; ignored where `config` is given and changed. Without it demo for mini,
            best for paper.
        config: every stage's config; one that is left as it is by default counts as none.
        seeds: how many seeds, from 0.
        runner: where photos are scored, patches embedded and SR networks trained: in the run itself, one by one; in threads
            (but networks one by one) or processes of its machine; or on Ray. What goes to the pool for GPUs goes there.
        workers: how many of them at once, where it is not one by one.
        home: where artifacts and runs are kept.
        run: name of the run below `home/runs`; the experiment's name if not given.
        device: torch device; auto takes a GPU where there is one.
        gpu: where GPU stages run: here, or on the pool that `ddsr deploy` made for them.
        overrides: single fields laid over the preset or over `config`, such as sample.count=140.
        command: how the run was started; stands above the table.
    """
    refuse_endless_crashes()
    config = chosen_config(preset or DEFAULT_PRESET[scale], config, overrides, scale)
    store, name = open_store(home), run or experiment
    check_run_name(name)
    with failure_noted(store, name):
        build, log = prefect_builder(store, device, gpu, runner=runner, workers=workers), run_log(store, name)
        design, ahead = design_of(experiment, scale), prefect_fan_out(runner, workers, gpu)
        done = measure(design, config, images, test, seeds, store, name, build, log, command, ahead, device)
    create_markdown_artifact(done.markdown(), key=experiment, description=done.about)
    return finish(store, name, done)
