"""Charts of the report as inline SVG, colored by the page's CSS: lines, histograms, and dots with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 40
#: Curves with more points are averaged in bins.
CURVE_POINTS = 150
#: Share of a curve's points in the window of its moving average.
SMOOTHING = 0.08
#: Of dot plots, in units of the view box: height of a row, width of a letter, and most space for labels.
ROW_HEIGHT, LETTER_WIDTH, MOST_LABEL_WIDTH = 26, 6.9, 250

Series = Mapping[str, tuple[np.ndarray, np.ndarray]]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers within [low, high].

    >>> ticks(0, 1), ticks(17.2, 31)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [18.0, 20.0, 22.0, 24.0, 26.0, 28.0, 30.0])
    """
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(unit * power for unit in (1, 2, 5, 10) if unit * power * count >= span * 0.7)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(series: Series, *, title: str, x_label: str, y_label: str, smooth: bool = False) -> str:
    """Lines of ``name: (x, y)``.

    Args:
        smooth: draw the moving average of each line, and the line itself faintly behind it.
    """
    binned = {name: _binned(np.asarray(x, float), np.asarray(y, float)) for name, (x, y) in series.items()}
    binned = {name: points for name, points in binned.items() if len(points[0])}
    if not binned:
        return ""
    frame = _Frame(np.concatenate([x for x, _ in binned.values()]), np.concatenate([y for _, y in binned.values()]))
    shapes = []
    for index, (name, (x, y)) in enumerate(binned.items()):
        if smooth:
            shapes.append(_polyline(frame, x, y, f"raw c{index % 6}", name))
        shapes.append(_polyline(frame, x, moving_average(y) if smooth else y, f"line c{index % 6}", name))
    return frame.svg(title, "".join(shapes), x_label, y_label)


def _polyline(frame: _Frame, x: np.ndarray, y: np.ndarray, style: str, name: str) -> str:
    points = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in zip(x, y, strict=True))
    return f'<polyline class="{style}" points="{points}"><title>{escape(name)}</title></polyline>'


def moving_average(values: np.ndarray) -> np.ndarray:
    """Centered moving average over `SMOOTHING` of the points; windows shrink at both ends.

    >>> moving_average(np.array([1.0, 1.0, 4.0, 1.0, 1.0])).tolist()
    [1.0, 2.0, 2.0, 2.0, 1.0]
    """
    reach = max(1, round(SMOOTHING * len(values) / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    reach_of = np.minimum(reach, np.minimum(places, len(values) - 1 - places))
    return (sums[places + reach_of + 1] - sums[places - reach_of]) / (2 * reach_of + 1)


def histogram(groups: dict[str, np.ndarray], *, title: str, x_label: str, bins: int = 40) -> str:
    """Outlines of histograms over common bins, each as a share of its group in percent."""
    if not groups:
        return ""
    values = np.concatenate(list(groups.values()))
    low, high = (float(v) for v in np.percentile(values, (0.5, 99.5)))
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    shares = {name: 100 * np.histogram(np.clip(v, edges[0], edges[-1]), edges)[0] / len(v) for name, v in groups.items()}
    frame = _Frame(edges, np.array([0, max(float(share.max()) for share in shares.values())]))
    shapes = []
    for index, (name, share) in enumerate(shares.items()):
        xs, ys = np.repeat(edges, 2), np.concatenate([[0], np.repeat(share, 2), [0]])
        points = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in zip(xs, ys, strict=True))
        shapes.append(f'<polygon class="area c{index % 6}" points="{points}"><title>{escape(name)}</title></polygon>')
    return frame.svg(title, "".join(shapes), x_label, "share, %")


def _binned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= CURVE_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), CURVE_POINTS)
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])


class _Frame:
    """Axes of one chart: data to SVG coordinates, grid and labels."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.x_low, self.x_high = float(x.min()), float(x.max())
        self.y_low, self.y_high = float(y.min()), float(y.max())
        margin = 0.04 * (self.y_high - self.y_low)
        self.y_high += margin
        self.y_low -= margin if self.y_low else 0

    def x(self, value: float) -> float:
        span = (self.x_high - self.x_low) or 1
        return LEFT + (value - self.x_low) / span * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        span = (self.y_high - self.y_low) or 1
        return HEIGHT - BOTTOM - (value - self.y_low) / span * (HEIGHT - TOP - BOTTOM)

    def svg(
        self, title: str, shapes: str, x_label: str, y_label: str, x_ticks: Sequence[tuple[float, str]] | None = None
    ) -> str:
        bottom, middle = HEIGHT - BOTTOM, (HEIGHT - BOTTOM + TOP) / 2
        parts = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" class="chart">',
            f"<title>{escape(title)}</title>",
        ]
        for value in ticks(self.y_low, self.y_high):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        if x_ticks is None:
            x_ticks = [(value, f"{value:g}") for value in ticks(self.x_low, self.x_high)]
        for value, text in x_ticks:
            parts.append(f'<text x="{self.x(value):.1f}" y="{bottom + 16}" text-anchor="middle">{text}</text>')
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
        parts.append(shapes)
        parts.append(
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>'
        )
        parts.append(
            f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text></svg>'
        )
        return "".join(parts)


@dataclass(frozen=True)
class Dots:
    """A row of a dot plot.

    Attributes:
        label: text to the left of the row.
        values: small dots, such as one per seed.
        mean: the large dot.
        half_width: of the interval around the mean; None for no interval.
        color: number of its color, 0 to 5.
    """

    label: str
    values: Sequence[float]
    mean: float
    half_width: float | None = None
    color: int = 2


def dot_plot(rows: Sequence[Dots], *, title: str, x_label: str, line: float, line_label: str) -> str:
    """Rows of dots over one axis, with a vertical line to compare with, such as zero or bicubic."""
    if not rows:
        return ""
    ends = [row.mean + sign * (row.half_width or 0) for row in rows for sign in (-1, 1)]
    values = [line, *ends, *(value for row in rows for value in row.values)]
    low, high = min(values), max(values)
    margin, left = 0.06 * (high - low or 1), min(MOST_LABEL_WIDTH, 14 + LETTER_WIDTH * max(len(row.label) for row in rows))
    low, high, bottom = low - margin, high + margin, 22 + ROW_HEIGHT * len(rows)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - RIGHT)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {bottom + BOTTOM}" role="img" aria-label="{escape(title)}" class="chart">',
        f"<title>{escape(title)}</title>",
    ]
    for value in ticks(low, high, 4):
        parts.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="18" y2="{bottom}"/>')
        parts.append(f'<text x="{x(value):.1f}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<line class="axis" x1="{x(line):.1f}" x2="{x(line):.1f}" y1="18" y2="{bottom}"/>')
    parts.append(f'<text x="{x(line):.1f}" y="12" text-anchor="middle">{escape(line_label)}</text>')
    parts += [_dots(row, left, 22 + ROW_HEIGHT * (index + 0.5), x) for index, row in enumerate(rows)]
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{bottom + 34}" text-anchor="end">{escape(x_label)}</text></svg>')
    return "".join(parts)


def _dots(row: Dots, left: float, y: float, x: Callable[[float], float]) -> str:
    color = f"c{row.color}"
    parts = [f'<text class="label" x="{left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(row.label)}</text>']
    if row.half_width is not None:
        ends = x(row.mean - row.half_width), x(row.mean + row.half_width)
        parts.append(f'<line class="interval {color}" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts += [f'<circle class="seed {color}" cx="{x(value):.1f}" cy="{y:.1f}" r="3"/>' for value in row.values]
    parts.append(f'<circle class="dot {color}" cx="{x(row.mean):.1f}" cy="{y:.1f}" r="5"/>')
    return "".join(parts)


@dataclass(frozen=True)
class SeedLine:
    """A line through the means of several seeds.

    Attributes:
        points: (x, one value per seed), x above 0; empty for a horizontal line at the mean of ``level``.
        level: values of a horizontal line, one per seed.
        color: number of its color, 0 to 5; None for gray.
    """

    label: str
    points: Sequence[tuple[int, Sequence[float]]] = ()
    level: Sequence[float] = ()
    color: int | None = None


def seed_chart(lines: Sequence[SeedLine], *, title: str, x_label: str, y_label: str) -> str:
    """Means over seeds against a count on a logarithmic axis, with a dot per seed; levels are dashed lines."""
    columns = sorted({x for line in lines for x, _ in line.points})
    values = [v for line in lines for _, own in line.points for v in own] + [v for line in lines for v in line.level]
    if not columns:
        return ""
    frame = _Frame(np.log10([columns[0] / 1.15, columns[-1] * 1.15]), np.array(values))
    shapes = []
    for line in lines:
        color = "axis" if line.color is None else f"c{line.color}"
        if line.level:
            y = frame.y(sum(line.level) / len(line.level))
            ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
            shapes.append(f'<line class="level {color}" {ends}><title>{escape(line.label)}</title></line>')
            continue
        x_places = np.log10([x for x, _ in line.points])
        means = np.array([sum(own) / len(own) for _, own in line.points])
        shapes.append(_polyline(frame, x_places, means, f"line {color}", line.label))
        for x, own in line.points:
            for value in own:
                place = f'cx="{frame.x(math.log10(x)):.1f}" cy="{frame.y(value):.1f}"'
                shapes.append(f'<circle class="seed {color}" {place} r="3.5"/>')
    x_ticks = [(math.log10(column), f"{column:,}") for column in columns]
    return frame.svg(title, "".join(shapes), x_label, y_label, x_ticks)
