"""What a user asks for: one frozen model that the command line, the flows, the Prefect form and Python share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from ddsr_core.pipeline.config import PipelineConfig, Preset, chosen_config
from ddsr_core.reporters import ReporterName, Tracking
from ddsr_core.storage.remote_store import Home

#: Where GPU stages run: in the process of the run, or on the work pool that `ddsr deploy` made for them.
Gpu = Literal["local", "pool"]
#: How work that can be split is computed: in the process of the run, in threads or processes of its machine, or on Ray.
Runner = Literal["sequential", "threads", "processes", "ray"]
AtLeastOne = Annotated[int, Field(ge=1)]
#: A complete configuration as a flow's parameter, for use from Python. The form shows preset and overrides, not 130 fields.
GivenConfig = Annotated[PipelineConfig | None, SkipJsonSchema()]


def name_of(photos: Path) -> str:
    """Short name of a photo source in names of runs: ``holidays`` for ``/data/holidays`` and ``/data/holidays/*.jpg``."""
    path = photos.expanduser()
    while path.name and any(sign in path.name for sign in "*?["):
        path = path.parent
    text = path.resolve().stem if path.suffix else path.resolve().name
    return slug(text)


def slug(text: str) -> str:
    """Text as part of a run's name: letters, digits, - and _."""
    return "".join(sign if sign.isalnum() or sign in "-_" else "-" for sign in text).strip("-") or "photos"


class Execution(BaseModel):
    """Where a run computes and keeps its results. No field changes a result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    home: Home = Field("ddsr-home", description="Folder or s3://bucket/prefix for artifacts and runs.")
    device: str = Field("auto", description="Torch device, such as cpu or cuda:1. auto uses a GPU if there is one.")
    gpu: Gpu = Field("local", description="Where GPU stages run: on this machine, or on the GPU work pool.")
    runner: Runner = Field(
        "sequential",
        description="How photos are scored, patches embedded and SR networks trained: sequentially in the run's process, "
        "in threads or processes on its machine, or on Ray.",
    )
    side_by_side: bool = Field(
        True,
        description="Train SR networks whose steps are small side by side on a CPU, one per core, if the runner is "
        "sequential. Turn it off if memory is short: each takes about 1 GiB.",
    )
    workers: AtLeastOne = Field(2, description="Number of parallel workers. The sequential runner ignores it.")
    report_to: ReporterName | None = Field(
        None, description="Program that shows the curves of fine-tuning and SR training. Its files go to home/tracking."
    )

    @property
    def run_name(self) -> str:
        """Name of the run; empty for stages that belong to none."""
        return ""

    def tracking(self, name: str, key: str) -> Tracking | None:
        """Where the curves of a stage are shown; None: nowhere.

        Args:
            name: of the stage in its run, such as ``finetune`` or ``edsr-small/distilled``.
            key: of its artifact; the start of it distinguishes trainings of one name.
        """
        if self.report_to is None:
            return None
        return Tracking(to=self.report_to, run=self.run_name, label=f"{name}-{key[:8]}".replace(" ", "-"))


class RunRequest(Execution):
    """One run of the pipeline.

    Attributes:
        kind: of run; runs of different kinds never share a name.
    """

    kind: ClassVar[str] = "distill"

    images: Path = Field(description="Training photos: a folder, a Parquet file with an image column, or a glob pattern.")
    test: Path | None = Field(None, description="Test photos. Without them, one photo in ten is held out.")
    preset: Preset = Field("demo", description="Values that the configuration starts from.")
    overrides: tuple[str, ...] = Field((), description="Single fields to change, such as sample.count=140.")
    config: PipelineConfig | None = Field(None, description="Full configuration, which replaces the preset.")
    run: str | None = Field(None, description="Name of the run below home/runs. Without it, preset and folder.")

    @property
    def base_preset(self) -> Preset:
        """The preset that the configuration starts from, if none is given."""
        return self.preset

    def resolved_config(self) -> PipelineConfig:
        """The configuration that the run uses: ``config``, or else the preset, with the overrides applied.

        Raises:
            ConfigError: unknown preset or field, or a value out of range.
        """
        return chosen_config(self.base_preset, self.config, self.overrides)

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.config is not None and self.preset not in (self.config.preset, type(self).model_fields["preset"].default):
            raise ValueError(
                f"the preset {self.preset} and a complete configuration (from {self.config.preset}) contradict each other; "
                "leave one of them out"
            )
        return self

    @property
    def run_name(self) -> str:
        """Name of the run: the user's, or else preset and photos, such as ``best-holidays``."""
        return self.run or f"{self.preset if self.config is None else self.config.preset}-{name_of(self.images)}"
