"""Charts as SVG."""

import re

import numpy as np

from ddsr_core.report.charts import Dots, dot_plot, histogram, line_chart, moving_average


def test_histogram_shares_sum_to_100_percent() -> None:
    svg = histogram({"a": np.full(10, 20.0), "b": np.arange(10.0)}, title="t", x_label="x", bins=5)
    assert svg.count("<polygon") == 2
    assert histogram({}, title="t", x_label="x") == ""


def test_line_chart_bins_long_curves_and_drops_what_is_not_finite() -> None:
    x = np.arange(1000.0)
    svg = line_chart({"a": (x, np.where(x == 3, np.nan, x))}, title="t", x_label="x", y_label="y")
    points = re.findall(r'points="([^"]*)"', svg)[0].split()
    assert len(points) == 150
    assert "nan" not in svg


def test_a_moving_average_keeps_a_constant_and_halves_noise() -> None:
    assert moving_average(np.full(40, 3.0)).tolist() == [3.0] * 40
    noise = np.random.default_rng(0).normal(size=400)
    assert moving_average(noise).std() < noise.std() / 3


def test_a_smoothed_chart_has_the_curve_and_its_average() -> None:
    svg = line_chart({"a": (np.arange(9.0), np.arange(9.0) % 2)}, title="t", x_label="x", y_label="y", smooth=True)
    assert len(re.findall(r'class="(raw|line) c0"', svg)) == 2


def test_a_dot_plot_shows_every_seed_the_mean_and_the_interval_on_one_axis() -> None:
    rows = [Dots("better", (0.1, 0.3), 0.2, 0.1), Dots("<worse>", (-0.2,), -0.2)]
    svg = dot_plot(rows, title="t", x_label="x", line=0.0, line_label="equal")
    assert svg.count("<circle") == 3 + 2
    assert svg.count('class="interval') == 1
    assert "&lt;worse&gt;" in svg
    zero = float(re.findall(r'class="axis" x1="([\d.]+)"', svg)[0])
    means = [float(x) for x in re.findall(r'class="dot c2" cx="([\d.]+)"', svg)]
    assert means[1] < zero < means[0]
