"""Name, label, unit, digits, direction and implementation of every metric, defined nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, WithJsonSchema

from ddsr_core.factories import load_factory


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
        measure: ``module:factory`` of the implementation. The factory takes a torch device and returns a callable that maps
            two batches ``(B, 3, H, W)`` in [0, 1], SR and HR, to values ``(B,)``. Empty: a field of
            `ddsr_core.metrics.psnr_ssim.Fidelity`, which computes its four metrics in one pass.
    """

    name: str
    label: str
    unit: str = ""
    digits: int = 4
    higher_is_better: bool = True
    default: bool = True
    measure: str = ""

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

    def load(self, device: str) -> Any:
        """The implementation that ``measure`` names, on a torch device."""
        return load_factory(self.measure, "METRICS")(device)  # torch, once something is measured

    def gain(self, value: float, reference: float) -> float:
        """How much better ``value`` is than ``reference``; negative if it is worse."""
        return value - reference if self.higher_is_better else reference - value


#: LPIPS and the SSIM window need HR images of this side.
MIN_SIDE_PX = 32

#: Every metric of an SR network, in the order of tables. A new one is a file in `ddsr_core.metrics` and one line here.
METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("psnr_y", "PSNR-Y", "dB", digits=3),
        Metric("ssim_y", "SSIM-Y"),
        Metric("psnr_rgb", "PSNR-RGB", "dB", digits=3),
        Metric("ssim_rgb", "SSIM-RGB"),
        Metric("lpips", "LPIPS", higher_is_better=False, measure="ddsr_core.metrics.lpips:lpips_alex"),
        Metric("lpips_vgg", "LPIPS-VGG", higher_is_better=False, default=False, measure="ddsr_core.metrics.lpips:lpips_vgg"),
        Metric("dists", "DISTS", higher_is_better=False, default=False, measure="ddsr_core.metrics.dists:Dists"),
    )
}


def known_metric(name: str) -> str:
    """The name itself.

    Raises:
        ValueError: not a name in `METRICS`.
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; use one of {', '.join(METRICS)}")
    return name


#: A name in `METRICS`, as a type of config fields.
MetricName = Annotated[
    str, AfterValidator(known_metric), WithJsonSchema({"type": "string", "enum": list(METRICS), "title": "Metric"})
]
#: Metrics that are reported by default.
DEFAULT_METRICS: tuple[MetricName, ...] = tuple(name for name, metric in METRICS.items() if metric.default)
