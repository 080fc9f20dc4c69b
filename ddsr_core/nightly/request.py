"""What a user asks for with `ddsr nightly`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from ddsr_core.metrics.spec import MetricName
from ddsr_core.nightly.night import Night, outcome_data, outcome_if_unchanged, photo_cache_of, run_night
from ddsr_core.nightly.registry import folder_of
from ddsr_core.pipeline.plain import plain_backend
from ddsr_core.pipeline.request import RunRequest
from ddsr_core.progress import ProgressFactory, silent
from ddsr_core.storage.remote_store import open_store


class NightRequest(RunRequest):
    """One night of a series."""

    test: Path = Field(description="Photos that the old and the new set are compared on.")
    name: str = Field("nightly", description="Name of the series, HOME/nightly/NAME.")
    metric: MetricName = Field("psnr_y", description="Metric by which the two sets are compared.")
    margin: float = Field(0.0, ge=0, description="How much worse the new set may be, in the metric's unit.")
    warm: bool = Field(
        True, description="Continue from the last adapter. Turn it off to fine-tune from the base model every night."
    )
    warm_steps: int | None = Field(None, ge=0, description="Steps when fine-tuning continues. None: as from the base model.")

    @property
    def run_name(self) -> str:
        """Name of the series; its runs are numbered.

        Raises:
            ConfigError: it cannot be the name of a series.
        """
        folder_of(self.name)
        return self.name

    def night(self) -> Night:
        """The night, with its configuration resolved.

        Raises:
            ConfigError: unknown preset or field, or a value out of range.
        """
        config = self.resolved_config()
        return Night(
            self.name, self.images, self.test, config, self.metric, self.margin, self.warm, self.warm_steps, self
        )  # fmt: skip


def run_night_plainly(request: NightRequest, progress: ProgressFactory = silent) -> dict[str, Any]:
    """Run a night without Prefect. Returns `outcome_data`."""
    store = open_store(request.home)
    backend = plain_backend(request, store, progress, request.name, photo_cache_of(request.name))
    return outcome_data(run_night(request.night(), store, backend), request.name)


def unchanged_night(request: NightRequest) -> dict[str, Any] | None:
    """The result of a night if nothing has changed; None if there is work to do."""
    outcome = outcome_if_unchanged(request.night(), open_store(request.home))
    return None if outcome is None else outcome_data(outcome, request.name)
