"""The stage flow: one stage of another run, on a machine with a GPU. Runs send it there; nobody needs to start it."""

from __future__ import annotations

from typing import Any

from prefect import flow

from ddsr_core.storage.remote_store import Home
from ddsr_core.storage.store import InputRef, Manifest
from tasks.recovery import refuse_endless_crashes
from tasks.stages import StageName, run_task


@flow(name="stage")
def stage(
    stage: StageName,
    key: str,
    config: dict[str, Any],
    config_class: str,
    inputs: dict[str, InputRef],
    home: Home,
    device: str = "auto",
    label: str = "",
    photo_cache: str | None = None,
) -> Manifest:
    """Build one artifact for another run.

    Args:
        stage: its name.
        key: of the artifact.
        config: the stage's config, `config_class` its class.
        inputs: what it reads: paths that this machine shares, or artifacts of the home.
        home: where artifacts are kept: a folder that both machines share, or s3://bucket/prefix.
        device: torch device; auto takes a GPU where there is one.
        label: shown in the run's name.
        photo_cache: what is known of single photos and patches, a folder relative to the home.
    """
    refuse_endless_crashes()
    facts = {
        "key": key,
        "config": config,
        "config_class": config_class,
        "inputs": inputs,
        "home": home,
        "photo_cache": photo_cache,
    }
    # The artifact is not in this home, or the run would not be here; Prefect may have cached that of another home.
    return run_task(stage, label, {**facts, "device": device}, refresh=True)
