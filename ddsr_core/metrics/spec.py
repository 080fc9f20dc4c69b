"""Name, label, unit, digits and direction of every metric, defined nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

#: Metrics of an SR network that `ddsr evaluate` can report, in the order of tables.
MetricName = Literal["psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "lpips", "lpips_vgg", "dists"]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: key in ``summary.json``, ``report.json`` and CSV files.
        label: as the literature writes it, without unit.
        unit: ``dB`` or empty.
        digits: decimals to show.
        higher_is_better: direction.
        default: whether it is reported by default.
    """

    name: MetricName
    label: str
    unit: str = ""
    digits: int = 4
    higher_is_better: bool = True
    default: bool = True

    @property
    def heading(self) -> str:
        """Label, unit, and an arrow if lower is better, for the head of a column."""
        unit = f", {self.unit}" if self.unit else ""
        return f"{self.label}{unit}{'' if self.higher_is_better else ' ↓'}"

    def text(self, value: float | None, missing: str = "-") -> str:
        """Format a value with the metric's digits.

        >>> METRICS["psnr_y"].text(26.4567)
        '26.457'
        """
        return missing if value is None else f"{value:.{self.digits}f}"

    def gain(self, value: float, reference: float) -> float:
        """How much better ``value`` is than ``reference``; negative if it is worse."""
        return value - reference if self.higher_is_better else reference - value


#: A new metric is one line here and a function in `ddsr_core.metrics`.
METRICS: Mapping[MetricName, Metric] = {
    metric.name: metric
    for metric in (
        Metric("psnr_y", "PSNR-Y", "dB", digits=3),
        Metric("ssim_y", "SSIM-Y"),
        Metric("psnr_rgb", "PSNR-RGB", "dB", digits=3),
        Metric("ssim_rgb", "SSIM-RGB"),
        Metric("lpips", "LPIPS", higher_is_better=False),
        Metric("lpips_vgg", "LPIPS-VGG", higher_is_better=False, default=False),
        Metric("dists", "DISTS", higher_is_better=False, default=False),
    )
}
#: Metrics that are reported by default.
DEFAULT_METRICS: tuple[MetricName, ...] = tuple(name for name, metric in METRICS.items() if metric.default)
