"""What a user asks for with `ddsr reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from ddsr_core.experiments.names import DEFAULT_PRESET, ExperimentName, ProtocolName
from ddsr_core.experiments.paper_tables import design_of
from ddsr_core.experiments.run import finish, measure
from ddsr_core.pipeline.config import PipelineConfig, Preset, chosen_config
from ddsr_core.pipeline.plain import plain_backend
from ddsr_core.pipeline.request import AtLeastOne, RunRequest
from ddsr_core.pipeline.run import open_run
from ddsr_core.pipeline.stages import Backend
from ddsr_core.progress import ProgressFactory, silent
from ddsr_core.storage.remote_store import open_store
from ddsr_core.storage.store import Store


class ExperimentRequest(RunRequest):
    """One experiment."""

    kind: ClassVar[str] = "reproduce"

    test: Path = Field(description="Test photos.")
    preset: Preset | None = Field(  # type: ignore[assignment]
        None, description="Values that the configuration starts from. Without it, demo for mini and best for paper."
    )
    experiment: ExperimentName = Field("ablation", description="What is measured.")
    protocol: ProtocolName = Field(
        "mini", description="mini: small networks and few images. paper: the paper's networks and numbers of images."
    )
    seeds: AtLeastOne = Field(3, description="Number of seeds, counted from 0. Conclusions need at least three.")
    command: str = Field("the flow `reproduce`", description="How the experiment was started; printed above the table.")

    @property
    def base_preset(self) -> Preset:
        return self.preset or DEFAULT_PRESET[self.protocol]

    def resolved_config(self) -> PipelineConfig:
        """As for a run, with the values of the protocol overriding the preset."""
        return chosen_config(self.base_preset, self.config, self.overrides, self.protocol)

    @property
    def run_name(self) -> str:
        return self.run or self.experiment


def run_experiment(request: ExperimentRequest, store: Store, backend: Backend) -> tuple[dict[str, Any], str]:
    """Run an experiment from its photos to its tables.

    Returns:
        What was measured, as plain data, and its tables as Markdown.
    """
    with open_run(request, store, backend) as run:
        design = design_of(request.experiment, request.protocol, run.stages.config)
        measured = measure(design, run, request.seeds, request.command)
        return {**finish(run, measured), "run": run.name}, measured.markdown()


def run_experiment_plainly(request: ExperimentRequest, progress: ProgressFactory = silent) -> dict[str, Any]:
    """Run an experiment without Prefect. Returns what was measured, as plain data."""
    store = open_store(request.home)
    return run_experiment(request, store, plain_backend(request, store, progress, request.run_name))[0]
