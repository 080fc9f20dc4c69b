"""A run as the report reads it: stages, networks and where their artifacts are. Imports pydantic alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    """Base of the report's models."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StageRecord(Frozen):
    """One stage of a run: its artifact, the seconds its build took, and whether this run found it in the cache."""

    name: str
    key: str
    seconds: float = Field(ge=0)
    cached: bool
    path: Path
    counts: dict[str, Any] = {}


class SrRecord(Frozen):
    """One SR network of a run, trained and measured.

    Attributes:
        source: a `ddsr_core.baselines.names.TrainingSetName`, or the name of a user's own training set.
        budget: number of training images; None if the set has no fixed size.
        train_path: `train_sr` artifact.
        evaluate_path: `evaluate` artifact.
    """

    arch: str
    source: str
    budget: int | None = None
    iterations: int
    seed: int
    params: int | None = None
    train_path: Path | None = None
    evaluate_path: Path | None = None


class RunRecord(Frozen):
    """A run as the report reads it. Stages are looked up by name, so any of them may be missing.

    Attributes:
        images: training photos, as the user gave them.
        test: test photos.
        left_out: number of training photos that were left out because they are also test photos.
        started: UTC, ISO 8601.
        finished: UTC, ISO 8601.
    """

    name: str
    preset: str
    images: str | None = None
    test: str | None = None
    left_out: int = 0
    started: str | None = None
    finished: str | None = None
    config: dict[str, Any] = {}
    stages: tuple[StageRecord, ...] = ()
    sr: tuple[SrRecord, ...] = ()
    bicubic_path: Path | None = None

    def path_of(self, stage: str) -> Path | None:
        """Artifact folder of the last stage with this name, or None."""
        return next((record.path for record in reversed(self.stages) if record.name == stage), None)

    @property
    def restored(self) -> bool:
        """Whether a teacher network restored detail in the distilled images (``sample.detail_restoration`` above 0)."""
        return float(self.config.get("sample", {}).get("detail_restoration") or 0) > 0
