"""Stages and SR networks of a run as Prefect tasks; GPU stages go to the GPU pool if the run says so."""

from __future__ import annotations

from collections.abc import Mapping

from ddsr_core.config import StageConfig, resolve_device
from ddsr_core.pipeline.plain import beside, idle_cores
from ddsr_core.pipeline.request import Execution
from ddsr_core.pipeline.stages import Backend
from ddsr_core.storage.stage import Artifact, Stage, StageInput
from ddsr_core.storage.store import Store
from tasks.networks import networks_at_once
from tasks.stages import build_stage


def prefect_backend(execution: Execution, store: Store, photo_cache: str | None = None) -> Backend:
    """Stages as tasks of the current flow run.

    Args:
        photo_cache: folder of a `ddsr_core.pseudo_labels.photo_cache`, relative to the home.
    """
    device = execution.device if execution.gpu == "pool" else resolve_device(execution.device)
    here = execution.model_copy(update={"device": device, "home": store.url})

    def build(stage: Stage, config: StageConfig, inputs: Mapping[str, StageInput], label: str = "") -> tuple[Artifact, bool]:
        known = photo_cache if stage.photo_cache else None
        return build_stage(store, stage, config, inputs, here, label, known)

    if execution.gpu == "local" and beside(execution, device):
        spread = here.model_copy(update={"runner": "processes", "workers": idle_cores()})
        return Backend(build, store.url, device, networks_at_once(spread), only_small=True, tracking=here.tracking)
    return Backend(build, store.url, device, networks_at_once(here), tracking=here.tracking)
