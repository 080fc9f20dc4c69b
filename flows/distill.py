"""The distill flow: the paper from end to end, stage by stage.

Every stage below is a Prefect task whose cache key is the key of the artifact that it builds. A run that is started again,
or that shares settings with an earlier run, therefore reuses finished artifacts and resumes interrupted ones. With
``gpu="pool"``, stages marked GPU run on the GPU work pool. The runner distributes stages marked "in parts" over its workers.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from ddsr_core.pipeline.config import Preset
from ddsr_core.pipeline.request import AtLeastOne, GivenConfig, Gpu, Runner, RunRequest
from ddsr_core.pipeline.run import open_run
from ddsr_core.pipeline.run_state import Outcome
from ddsr_core.pipeline.stages import Distilled, PseudoLabels
from ddsr_core.reporters import ReporterName
from ddsr_core.storage.remote_store import Home, open_store
from tasks.backend import prefect_backend
from tasks.preflight import require_ready
from tasks.recovery import refuse_endless_crashes
from tasks.run_pages import publish_run


@flow(name="distill")
def distill(
    images: Path,
    test: Path | None = None,
    preset: Preset = "demo",
    overrides: tuple[str, ...] = (),
    config: GivenConfig = None,
    home: Home = "ddsr-home",
    run: str | None = None,
    device: str = "auto",
    gpu: Gpu = "local",
    runner: Runner = "sequential",
    side_by_side: bool = True,
    workers: AtLeastOne = 2,
    report_to: ReporterName | None = None,
) -> Outcome:
    """Distill a folder of photos and compare SR networks trained on the result.

    Args:
        images: Training photos: a folder, a Parquet file with an image column, or a glob pattern.
        test: Test photos. Without them, one photo in ten is held out.
        preset: Values that the configuration starts from.
        overrides: Single fields to change, such as sample.count=140.
        config: Full configuration, which replaces the preset. For use from Python; the form does not show it.
        home: Folder or s3://bucket/prefix for artifacts and runs.
        run: Name of the run below home/runs. Without it, preset and folder, such as best-holidays.
        device: Torch device, such as cpu or cuda:1. auto uses a GPU if there is one.
        gpu: Where GPU stages run: on this machine, or on the GPU work pool.
        runner: How photos are scored, patches embedded and SR networks trained: sequentially in the run's process, in
            threads or processes on its machine, or on Ray.
        side_by_side: Train SR networks whose steps are small side by side on a CPU, one per core, if the runner is
            sequential. Turn it off if memory is short: each takes about 1 GiB.
        workers: Number of parallel workers. The sequential runner ignores it.
        report_to: Program that shows the curves of fine-tuning and SR training. Its files go to home/tracking.
    """
    refuse_endless_crashes()
    request = RunRequest(
        images=images, test=test, preset=preset, overrides=overrides, config=config, home=home, run=run, device=device,
        gpu=gpu, runner=runner, side_by_side=side_by_side,
        workers=workers, report_to=report_to,
    )  # fmt: skip
    store = open_store(request.home)
    require_ready(request, store)
    with open_run(request, store, prefect_backend(request, store), wait=True) as begun:
        photos, stages = begun.photos, begun.stages

        # Section II-A: pseudo labels
        accepted = stages.patches(photos)  # in parts
        embedded = stages.embeddings(accepted)  # GPU, in parts
        clusters = stages.clusters(embedded)
        labels = PseudoLabels(accepted, embedded, clusters)

        # Section II-B: fine-tuning the diffusion transformer
        encoded = stages.latents(accepted)  # GPU
        rows = stages.class_rows(accepted, clusters)  # only if fine-tuning starts from them
        adapter = stages.finetune(encoded, clusters, rows)  # GPU

        # Section II-C: sampling and selection
        teacher = stages.teacher(accepted)  # GPU; a train_sr, only if the config asks for it
        distilled = Distilled(photos, labels, stages.sample(adapter, labels, encoded, teacher))  # GPU

        # Section III: the training sets to compare with (crops, subset, gsdd), then train_sr and evaluate for each network:
        # GPU, fanned out over the runner
        comparison = begun.compare(distilled)
        outcome = begun.finish(distilled, comparison)
    publish_run(outcome, store)
    return outcome
