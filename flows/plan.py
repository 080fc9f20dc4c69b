"""The plan flow: what a run will cost and whether it fits, as a table in the Prefect UI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from ddsr_core.pipeline.config import PipelineConfig, Preset, chosen_config
from ddsr_core.planning.request import PlanRequest, plan_of, row_of, summary_of
from ddsr_core.storage.remote_store import Home, open_store


@flow(name="plan")
def plan(
    images: Path | None = None,
    sizes: str | None = None,
    test: Path | None = None,
    preset: Preset = "demo",
    overrides: tuple[str, ...] = (),
    config: PipelineConfig | None = None,
    gpu: str | None = None,
    price: float | None = None,
    accepted: float = 0.5,
    home: Home = "ddsr-home",
    device: str = "auto",
) -> dict[str, Any]:
    """Plan a run without computing anything; no weights are needed.

    Args:
        images: Training photos: a folder, a Parquet file with an image column, or a glob pattern. Only sizes are read.
        sizes: Number and size of photos that are not on this machine, such as 10000@1280x960. Set either this or images.
        test: Test photos. Without them, one photo in ten is held out.
        preset: Values that the configuration starts from.
        overrides: Single fields to change, such as sample.count=140.
        config: Full configuration, which replaces the preset. For use from Python; leave it empty in the form.
        gpu: Machine to plan for: rtx3090, rtx4090, a100, h100, h200, cpu, or a file written by `ddsr bench`. None: this one.
        price: Price of that machine per hour, in any currency.
        accepted: Share of the windows that patches.threshold_db is assumed to accept, 0 to 1.
        home: Folder or s3://bucket/prefix in which `ddsr bench` has stored the rates of this machine.
        device: Torch device of this machine.
    """
    request = PlanRequest(
        config=chosen_config(preset, config, overrides), images=images, sizes=sizes, test=test, gpu=gpu, price=price,
        accepted=accepted,
    )  # fmt: skip
    planned = plan_of(request, open_store(home).home, device)
    rows = [row_of(stage) for stage in planned.stages]
    create_table_artifact(key="ddsr-plan", table=rows, description=f"Plan of {planned.preset} on {planned.machine}")
    create_markdown_artifact(summary_of(planned), key="ddsr-plan-summary", description="Time, cost, disk and memory")
    return planned.as_json()
