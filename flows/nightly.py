"""The nightly flow: distill again what has changed, and keep the result only if it is not worse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact

from ddsr_core.metrics.spec import MetricName as Metric
from ddsr_core.nightly.night import Night, challenge, facts_of, photo_cache_of
from ddsr_core.pipeline.config import PipelineConfig, Preset, chosen_config
from ddsr_core.storage.remote_store import Home, open_store
from flows.building import prefect_builder
from tasks.recovery import refuse_endless_crashes
from tasks.run_pages import artifact_key
from tasks.stages import Gpu


@flow(name="nightly")
def nightly(
    images: Path,
    test: Path,
    preset: Preset = "demo",
    config: PipelineConfig | None = None,
    name: str = "nightly",
    metric: Metric = "psnr_y",
    margin: float = 0.0,
    warm: bool = True,
    warm_steps: int | None = None,
    home: Home = "ddsr-home",
    device: str = "auto",
    gpu: Gpu = "local",
    overrides: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Distil again if photos or settings have changed; the new set takes the old one's place if it is not worse.

    Returns `version`, the new one or none where nothing had changed, `champion`, the number of the one in use, and `text`.

    Args:
        images: training photos: a folder, Parquet with an image column, or a glob pattern.
        test: photos that SR networks trained on both sets are measured on.
        preset: demo, released, paper or best; ignored where `config` is given and changed.
        config: every stage's config; one that is left as it is by default counts as none.
        name: of the series: its history and its current set lie in `home/nightly/<name>`.
        metric: what the two sets are compared by.
        margin: how much worse the new set may be, in the metric's unit.
        warm: fine-tuning goes on from the last adapter.
        warm_steps: optimizer steps then; as many as from the base if not given.
        home: where artifacts and runs are kept: a folder or s3://bucket/prefix.
        device: torch device; auto takes a GPU where there is one.
        gpu: where GPU stages run: here, or on the pool that `ddsr deploy` made for them.
        overrides: single fields laid over the preset or over `config`, such as sample.count=140.
    """
    refuse_endless_crashes()
    store = open_store(home)
    config = chosen_config(preset, config, overrides)
    night = Night(name, images, test, config, metric, margin, warm, warm_steps)
    outcome = challenge(night, store, prefect_builder(store, device, gpu, photo_cache_of(name)))
    facts = facts_of(outcome, name)
    get_run_logger().info(facts["text"].splitlines()[0].replace("**", ""))
    create_markdown_artifact(facts["text"], key=f"ddsr-{artifact_key(name)}", description="Before and after")
    return facts
