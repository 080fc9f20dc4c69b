"""What was measured: the values of one image, and their means over a test set."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ddsr_core.metrics.psnr_ssim import mean_psnr
from ddsr_core.metrics.spec import METRICS


@dataclass(frozen=True)
class ImageScores:
    """Metrics of one image.

    Attributes:
        image: name of the image.
        height, width: of the HR image that was measured, before its border is cut off.
        values: by name of the metric. PSNR in dB, infinite if SR equals HR.
    """

    image: str
    height: int
    width: int
    values: Mapping[str, float]

    def row(self) -> dict[str, Any]:
        """One flat row, as in ``per_image.parquet``. Metrics that were not measured are None."""
        size = {"image": self.image, "height": self.height, "width": self.width}
        return size | {name: self.values.get(name) for name in METRICS}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> ImageScores:
        """The inverse of `row`."""
        values = {name: row[name] for name in METRICS if row.get(name) is not None}
        return cls(row["image"], row["height"], row["width"], values)


def mean_scores(scores: Iterable[ImageScores]) -> dict[str, float | None]:
    """Mean of each metric over images, in the order of `METRICS`.

    Infinite PSNR is left out (`mean_psnr`). Default metrics are always present, and None if there is no value; other
    metrics are present if they were measured.
    """
    rows = list(scores)
    means: dict[str, float | None] = {}
    for name, metric in METRICS.items():
        values = [row.values[name] for row in rows if name in row.values]
        if values or metric.default:
            means[name] = mean_psnr(values) if name.startswith("psnr") else _mean(values)
    return means


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
