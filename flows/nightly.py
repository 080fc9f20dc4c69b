"""The nightly flow: distill again if anything has changed, and promote the result only if it is not worse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event

from ddsr_core.errors import ConfigError
from ddsr_core.metrics.spec import MetricName
from ddsr_core.nightly.night import outcome_data, photo_cache_of, run_night
from ddsr_core.nightly.request import NightRequest
from ddsr_core.pipeline.config import Preset
from ddsr_core.pipeline.request import AtLeastOne, GivenConfig, Gpu, Runner
from ddsr_core.reporters import ReporterName
from ddsr_core.storage.remote_store import Home, open_store
from tasks.backend import prefect_backend
from tasks.recovery import refuse_endless_crashes
from tasks.run_pages import artifact_key


@flow(name="nightly")
def nightly(
    images: Path | None = None,
    test: Path | None = None,
    preset: Preset = "demo",
    overrides: tuple[str, ...] = (),
    config: GivenConfig = None,
    name: str = "nightly",
    metric: MetricName = "psnr_y",
    margin: float = 0.0,
    warm: bool = True,
    warm_steps: int | None = None,
    home: Home = "ddsr-home",
    device: str = "auto",
    gpu: Gpu = "local",
    runner: Runner = "sequential",
    side_by_side: bool = True,
    workers: AtLeastOne = 2,
    report_to: ReporterName | None = None,
) -> dict[str, Any]:
    """Distill again if photos or settings have changed. The new set becomes the active one if it is not worse.

    Returns `version` (the new one, or none if nothing had changed), `active_version` (a number) and `text`.

    Args:
        images: Training photos (required): a folder, a Parquet file with an image column, or a glob pattern.
        test: Test photos (required), on which the old and the new set are compared.
        preset: Values that the configuration starts from.
        overrides: Single fields to change, such as sample.count=140.
        config: Full configuration, which replaces the preset. For use from Python; the form does not show it.
        name: Name of the series. Its history and its current set are in home/nightly/NAME.
        metric: Metric by which the two sets are compared.
        margin: How much worse the new set may be, in the metric's unit.
        warm: Continue fine-tuning from the last adapter. Turn it off to start from the base model every night.
        warm_steps: Optimizer steps when fine-tuning continues from the last adapter. Without it, as many as from the base
            model.
        home: Folder or s3://bucket/prefix for artifacts and runs.
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
    if images is None or test is None:
        raise ConfigError(
            "the night has no photos" if images is None else "the night has no test photos",
            where="the parameters images and test",
            fix="set both in the deployment `nightly` (Edit, or Custom Run), then activate its schedule",
        )
    request = NightRequest(
        images=images, test=test, preset=preset, overrides=overrides, config=config, name=name, metric=metric, margin=margin,
        warm=warm, warm_steps=warm_steps, home=home, device=device, gpu=gpu, runner=runner, side_by_side=side_by_side,
        workers=workers, report_to=report_to,
    )  # fmt: skip
    store = open_store(request.home)
    outcome = run_night(request.night(), store, prefect_backend(request, store, photo_cache_of(name)))
    data = outcome_data(outcome, name)
    get_run_logger().info(data["text"].splitlines()[0].replace("**", ""))
    if outcome.version is not None and outcome.version.promoted:
        emit_event("ddsr.night.promoted", {"prefect.resource.id": f"ddsr.night.{name}", "prefect.resource.name": name})
    create_markdown_artifact(data["text"], key=f"ddsr-{artifact_key(name)}", description="Before and after")
    return data
