"""The train-sr flow: one SR network on one data set."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from ddsr_core.imaging.photos import photo_source
from ddsr_core.pipeline.request import Execution, Gpu
from ddsr_core.sr import train_sr as training
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.storage.remote_store import Home, open_store
from ddsr_core.storage.stage import Manifest
from tasks.backend import prefect_backend


@flow(name="train-sr")
def train_sr(
    data: Path, config: TrainSRConfig | None = None, home: Home = "ddsr-home", device: str = "auto", gpu: Gpu = "local"
) -> Manifest:
    """Train one SR network.

    Args:
        data: Folder of HR images, an image set such as a run's `distilled/`, a patches artifact, or Parquet.
        config: Network and recipe.
        home: Folder or s3://bucket/prefix for artifacts.
        device: Torch device, such as cpu or cuda:1. auto takes a GPU if there is one.
        gpu: Where GPU stages run: on this machine, or on the GPU work pool.
    """
    config = config or TrainSRConfig()
    inputs = {"data": photo_source(data), **training.trunk_input(config)}
    backend = prefect_backend(Execution(home=home, device=device, gpu=gpu), open_store(home))
    return backend.build(training.STAGE, config, inputs, config.arch)[0].manifest
