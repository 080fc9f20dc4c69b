"""Config of the evaluation of SR networks."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from ddsr_core.config import StageConfig
from ddsr_core.metrics.spec import DEFAULT_METRICS, METRICS, MIN_SIDE_PX, MetricName
from ddsr_core.sr.config import Degradation


class EvaluateConfig(StageConfig):
    """Protocol and metrics. ``NAME: true`` or ``NAME: false`` adds a metric to ``metrics`` or removes it."""

    scale: int = Field(4, ge=2, le=8, description="Upsampling factor. It must match the weights.")
    mod_crop: int | None = Field(
        None,
        ge=1,
        le=64,
        description="HR sides are cropped to a multiple of this, in pixels. Empty: the scale. Set 8 for the published "
        "OST300 figures.",
    )
    degradation: Degradation = Field(
        "bicubic", description="How LR images are made if the test set has none, as in training (`train_sr.degradation`)."
    )
    metrics: tuple[MetricName, ...] = Field(DEFAULT_METRICS, min_length=1, description="Metrics to measure.")
    round_y: bool = Field(
        False,
        description="Round Y to whole levels, as MATLAB and many published tables do. Bicubic then enlarges Y alone, as "
        "their bicubic rows do. BasicSR does not round.",
    )
    tile_px: int = Field(
        512,
        ge=0,
        description="Larger LR images are split into tiles of this side. Lower it if memory runs out; 0: never split.",
    )
    tile_overlap_px: int = Field(48, ge=0, description="LR pixels at a tile's border that only provide context.")
    trust: tuple[str, ...] = Field(
        (), description="Networks of your own (module:Class) that weights files may import. Others are rejected."
    )
    crops: int = Field(4, ge=0, le=64, description="Number of test images to store a close-up of.")
    crop_px: int = Field(128, ge=MIN_SIDE_PX, description="Side of a close-up in HR pixels.")

    @model_validator(mode="before")
    @classmethod
    def _switches(cls, values: Any) -> Any:
        """Apply ``lpips: false`` and the like to ``metrics``."""
        if not isinstance(values, dict):
            return values
        switches = {name: values[name] for name in METRICS if isinstance(values.get(name), bool)}
        if not switches:
            return values
        wanted = [*values.get("metrics", DEFAULT_METRICS), *(name for name, wanted in switches.items() if wanted)]
        metrics = [name for name in METRICS if name in wanted and switches.get(name, True)]
        unknown = [name for name in wanted if name not in METRICS]  # left for the field to refuse
        return {name: value for name, value in values.items() if name not in switches} | {"metrics": metrics + unknown}

    @model_validator(mode="after")
    def _whole_lr_pixels(self) -> EvaluateConfig:
        if self.multiple % self.scale:
            raise ValueError(f"mod_crop ({self.mod_crop}) must be a multiple of scale ({self.scale})")
        if self.tile_px and self.tile_overlap_px * 2 >= self.tile_px:
            raise ValueError(f"tile_px ({self.tile_px}) must be more than twice tile_overlap_px ({self.tile_overlap_px})")
        return self

    @property
    def multiple(self) -> int:
        """HR sides are cropped to a multiple of this."""
        return self.scale if self.mod_crop is None else self.mod_crop
