"""The stage flow: one stage of another run, on a machine with a GPU. Other runs start it as needed."""

from __future__ import annotations

from typing import Any

from prefect import flow

from ddsr_core.reporters import Tracking
from ddsr_core.storage.remote_store import Home
from ddsr_core.storage.stage import Manifest
from ddsr_core.storage.store import InputRef
from tasks.recovery import refuse_endless_crashes
from tasks.stages import run_task


@flow(name="stage")
def stage(
    stage: str,
    key: str,
    config: dict[str, Any],
    inputs: dict[str, InputRef],
    home: Home,
    device: str = "auto",
    label: str = "",
    photo_cache: str | None = None,
    tracking: Tracking | None = None,
) -> Manifest:
    """Build one artifact for another run.

    Args:
        stage: Name of the stage.
        key: Key of the artifact.
        config: Configuration of the stage.
        inputs: Inputs of the stage: paths on a shared file system, or artifacts of the home.
        home: Where artifacts are stored: a folder that both machines share, or s3://bucket/prefix.
        device: Torch device, such as cpu or cuda:1. auto uses a GPU if there is one.
        label: Shown in the run's name.
        photo_cache: Folder with scores and embeddings of single photos, relative to the home.
        tracking: Program that shows the training curves, and their name in it.
    """
    refuse_endless_crashes()
    parameters = {
        "key": key, "config": config, "inputs": inputs, "home": home, "device": device, "photo_cache": photo_cache,
        "tracking": tracking,
    }  # fmt: skip
    # The caller found no artifact in this home. Ignore a manifest that Prefect has cached for another home.
    return run_task(stage, label, parameters, refresh=True)
