"""The train-sr flow: one SR network on one data set."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from ddsr_core.imaging.images import photo_source
from ddsr_core.sr import train_sr as training
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.storage.remote_store import Home, open_store
from ddsr_core.storage.store import Manifest
from flows.building import prefect_builder
from tasks.stages import Gpu


@flow(name="train-sr")
def train_sr(
    data: Path, config: TrainSRConfig | None = None, home: Home = "ddsr-home", device: str = "auto", gpu: Gpu = "local"
) -> Manifest:
    """Train one SR network.

    Args:
        data: folder of HR images, an image set such as a run's `distilled/`, a patches artifact, or Parquet.
        config: network and recipe.
        home: where artifacts are kept: a folder or s3://bucket/prefix.
        device: torch device; auto takes a GPU where there is one.
        gpu: where GPU stages run: here, or on the pool that `ddsr deploy` made for them.
    """
    config = config or TrainSRConfig()
    build = prefect_builder(open_store(home), device, gpu)
    return build(training.STAGE, config, {"data": photo_source(data), **training.trunk_input(config)}, config.arch)[
        0
    ].manifest
