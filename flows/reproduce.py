"""The reproduce flow: experiments on the method, as tasks that other runs can share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from ddsr_core.experiments.names import ExperimentName, ProtocolName
from ddsr_core.experiments.request import ExperimentRequest, run_experiment
from ddsr_core.pipeline.config import Preset
from ddsr_core.pipeline.request import AtLeastOne, GivenConfig, Gpu, Runner
from ddsr_core.reporters import ReporterName
from ddsr_core.storage.remote_store import Home, open_store
from tasks.backend import prefect_backend
from tasks.recovery import refuse_endless_crashes


@flow(name="reproduce")
def reproduce(
    images: Path,
    test: Path,
    experiment: ExperimentName = "ablation",
    protocol: ProtocolName = "mini",
    preset: Preset | None = None,
    overrides: tuple[str, ...] = (),
    config: GivenConfig = None,
    seeds: AtLeastOne = 3,
    home: Home = "ddsr-home",
    run: str | None = None,
    device: str = "auto",
    gpu: Gpu = "local",
    runner: Runner = "sequential",
    side_by_side: bool = True,
    workers: AtLeastOne = 2,
    report_to: ReporterName | None = None,
    command: str = "the flow `reproduce`",
) -> dict[str, Any]:
    """Measure what each part of the method contributes, or reproduce the paper's tables, seed by seed.

    Args:
        images: Training photos: a folder, a Parquet file with an image column, or a glob pattern.
        test: Test photos.
        experiment: What is measured.
        protocol: mini: small networks and few images. paper: the paper's networks and numbers of images.
        preset: Values that the configuration starts from. Without it, demo for mini and best for paper.
        overrides: Single fields to change, such as sample.count=140.
        config: Full configuration, which replaces the preset. For use from Python; the form does not show it.
        seeds: Number of seeds, counted from 0. Conclusions need at least three.
        home: Folder or s3://bucket/prefix for artifacts and runs.
        run: Name of the run below home/runs. Without it, the name of the experiment.
        device: Torch device, such as cpu or cuda:1. auto uses a GPU if there is one.
        gpu: Where GPU stages run: on this machine, or on the GPU work pool.
        runner: How photos are scored, patches embedded and SR networks trained: sequentially in the run's process, in
            threads or processes on its machine, or on Ray.
        side_by_side: Train SR networks whose steps are small side by side on a CPU, one per core, if the runner is
            sequential. Turn it off if memory is short: each takes about 1 GiB.
        workers: Number of parallel workers. The sequential runner ignores it.
        report_to: Program that shows the curves of fine-tuning and SR training. Its files go to home/tracking.
        command: How the experiment was started; printed above the table.
    """
    refuse_endless_crashes()
    request = ExperimentRequest(
        images=images, test=test, experiment=experiment, protocol=protocol, preset=preset, overrides=overrides,
        config=config, seeds=seeds, home=home, run=run, device=device, gpu=gpu, runner=runner, side_by_side=side_by_side,
        workers=workers, report_to=report_to,
        command=command,
    )  # fmt: skip
    store = open_store(request.home)
    measured, tables = run_experiment(request, store, prefect_backend(request, store))
    create_markdown_artifact(tables, key=experiment, description=str(measured["about"]))
    return measured
