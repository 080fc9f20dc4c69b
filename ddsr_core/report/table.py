"""The results table, also as CSV and Markdown: a row per architecture, training set, number of images and iterations."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ddsr_core.baselines.names import WHOLE
from ddsr_core.metrics.spec import METRICS, MetricName
from ddsr_core.report.data import FULL, RANDOM, MetricMeans, Report, SrResult, mean, means_of
from ddsr_core.report.record import Frozen
from ddsr_core.report.statistics import is_positive


class TableRow(Frozen):
    """Mean and sample standard deviation (``spread``) over the seeds of one (arch, source, budget, iterations).

    Attributes:
        label: what the table calls the training set, see `Report.label_of`.
        to_random: PSNR-Y minus that of random crops, dB.
        to_full: PSNR-Y minus that of the full set, dB.
        best: metrics in which the row leads the reduced sets of its architecture by more than the spread of seeds.
    """

    arch: str
    source: str
    label: str
    budget: int | None
    iterations: int | None
    seeds: int
    params: int | None
    images: int | None
    hr_pixels: int | None
    metrics: MetricMeans
    spread: MetricMeans
    to_random: float | None = None
    to_full: float | None = None
    best: frozenset[str] = frozenset()


def table_rows(report: Report) -> list[TableRow]:
    """Rows of the results table, in the order of `Report.sr`."""
    groups: dict[tuple[str, str, int | None, int], list[SrResult]] = {}
    for result in report.sr:
        record = result.record
        groups.setdefault((record.arch, record.source, record.budget, record.iterations), []).append(result)
    rows = [
        TableRow(
            arch=arch,
            source=source,
            label=report.label_of(source),
            budget=budget,
            iterations=iterations,
            seeds=len(group),
            params=group[0].params,
            images=group[0].images,
            hr_pixels=group[0].hr_pixels,
            metrics=_over_seeds(group, mean),
            spread=_over_seeds(group, spread),
        )
        for (arch, source, budget, iterations), group in groups.items()
    ]
    gaps = [{"to_random": _gap(row, RANDOM, rows), "to_full": _gap(row, FULL, rows)} for row in rows]
    best = _best(list(zip(rows, groups.values(), strict=True)))
    return [row.model_copy(update={**gap, "best": stars}) for row, gap, stars in zip(rows, gaps, best, strict=True)]


def _gap(row: TableRow, source: str, rows: Iterable[TableRow]) -> float | None:
    """PSNR-Y of ``row`` minus that of ``source`` at the same architecture, iterations and (except for ``full``) budget."""
    for other in rows:
        alike = (other.arch, other.source, other.iterations) == (row.arch, source, row.iterations)
        if alike and other is not row and (source == FULL or other.budget == row.budget):
            ours, theirs = row.metrics["psnr_y"], other.metrics["psnr_y"]
            return None if ours is None or theirs is None else ours - theirs
    return None


def _best(groups: Sequence[tuple[TableRow, list[SrResult]]]) -> list[frozenset[str]]:
    """For each row the metrics in which it leads the reduced sets of its architecture by more than chance explains."""
    return [_leads(row, own, [theirs for other, theirs in groups if _competes(row, other)]) for row, own in groups]


def _leads(row: TableRow, own: list[SrResult], rivals: list[list[SrResult]]) -> frozenset[str]:
    """The metrics in which ``own`` is ahead of all rivals; none without rivals."""
    if not rivals:
        return frozenset()
    return frozenset(name for name in row.metrics if all(is_positive(_gains(own, rival, name)) for rival in rivals))


def _competes(row: TableRow, other: TableRow) -> bool:
    return other is not row and other.arch == row.arch and row.source not in WHOLE and other.source not in WHOLE


def _gains(ours: Iterable[SrResult], theirs: Iterable[SrResult], name: MetricName) -> list[float]:
    """How much better a metric is, seed by seed, over the seeds that both have."""
    reference = {r.record.seed: value for r in theirs if (value := r.metrics.get(name)) is not None}
    own = {r.record.seed: value for r in ours if (value := r.metrics.get(name)) is not None}
    return [METRICS[name].gain(own[seed], reference[seed]) for seed in own if seed in reference]


def _over_seeds(group: list[SrResult], reduce: Callable[[list[float]], float | None]) -> MetricMeans:
    columns = {name: [value for r in group if (value := r.metrics.get(name)) is not None] for name in METRICS}
    return means_of({name: reduce(values) for name, values in columns.items()})


def metrics_shown(report: Report) -> list[MetricName]:
    """The metrics that the table has columns for: the default ones, and every other one that was measured."""
    rows = [result.metrics for result in report.sr] + ([report.bicubic] if report.bicubic else [])
    return [name for name in METRICS if name in means_of({}) or any(name in row for row in rows)]


def spread(values: list[float]) -> float | None:
    """Sample standard deviation; None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def plain_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text, the bicubic row first. ``source`` is the training set's label."""
    names = metrics_shown(report)
    header = ["arch", "source", "budget", "iterations", "seeds", "params", *names, "psnr_y_sd", "psnr_y_to_full"]
    rows = [_plain_row(row, names) for row in table_rows(report)]
    if report.bicubic:
        rows.insert(0, ["bicubic", *[""] * 5, *(number(report.bicubic.get(name), 4) for name in names), "", ""])
    return header, rows


def _plain_row(row: TableRow, names: list[MetricName]) -> list[str]:
    first = (row.arch, row.label, row.budget, row.iterations, row.seeds, row.params)
    metrics = [number(row.metrics.get(name), 4) for name in names]
    last = ("" if value is None else f"{value:.4f}" for value in (row.spread["psnr_y"], row.to_full))
    return [*("" if value is None else str(value) for value in first), *metrics, *last]


def as_csv(header: list[str], rows: list[list[str]]) -> str:
    """Comma-separated values with a header; cells that were not measured are empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([header, *([cell if cell != "–" else "" for cell in row] for row in rows)])
    return buffer.getvalue()


def as_markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    """``value`` with ``digits`` decimals; an en dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"
