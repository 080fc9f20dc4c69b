"""How metrics are written, and which direction is better."""

from __future__ import annotations

import pytest

from ddsr_core.metrics.spec import DEFAULT_METRICS, METRICS


def test_metrics_are_in_the_order_of_tables() -> None:
    assert list(METRICS)[:5] == list(DEFAULT_METRICS)
    assert all(name == metric.name for name, metric in METRICS.items())
    assert DEFAULT_METRICS == ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "lpips")


def test_values_and_headings() -> None:
    assert METRICS["psnr_y"].text(26.4567) == "26.457"
    assert METRICS["lpips"].text(0.51234) == "0.5123"
    assert METRICS["ssim_y"].text(None) == "-"
    assert METRICS["psnr_y"].heading == "PSNR-Y, dB"
    assert METRICS["lpips"].heading == "LPIPS ↓"


def test_a_gain_is_positive_where_the_value_is_better() -> None:
    assert METRICS["psnr_y"].gain(27.0, 26.0) == pytest.approx(1.0)
    assert METRICS["lpips"].gain(0.4, 0.5) == pytest.approx(0.1)
