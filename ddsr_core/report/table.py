"""The results table: one row an (architecture, source, budget, iterations), over seeds; as CSV and markdown too."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable

import numpy as np

from ddsr_core.report.data import FULL, METRICS, RANDOM, WHOLE, Frozen, Metrics, Report, SrResult, mean


class TableRow(Frozen):
    """Mean and sample standard deviation (``spread``) over the seeds of one (arch, source, budget, iterations)."""

    arch: str
    source: str
    budget: int | None
    iterations: int | None
    seeds: int
    params: int | None
    images: int | None
    hr_pixels: int | None
    metrics: Metrics
    spread: Metrics
    to_random: float | None = None
    to_full: float | None = None
    best: frozenset[str] = frozenset()


def table_rows(report: Report) -> list[TableRow]:
    """Rows of the results table. ``to_random``, ``to_full``: PSNR-Y less that of random crop and of the full set, dB.

    ``best`` names the metrics in which a row leads the reduced sets (all but ``full``) of its architecture.
    """
    groups: dict[tuple[str, str, int | None, int], list[SrResult]] = {}
    for result in report.sr:
        record = result.record
        groups.setdefault((record.arch, record.source, record.budget, record.iterations), []).append(result)
    rows = [
        TableRow(
            arch=arch,
            source=source,
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
    return [row.model_copy(update={**g, "best": _best(row, rows)}) for row, g in zip(rows, gaps, strict=True)]


def _gap(row: TableRow, source: str, rows: Iterable[TableRow]) -> float | None:
    """PSNR-Y of ``row`` less that of ``source`` at the same architecture, iterations and, but for ``full``, budget."""
    for other in rows:
        alike = (other.arch, other.source, other.iterations) == (row.arch, source, row.iterations)
        if alike and other is not row and (source == FULL or other.budget == row.budget):
            ours, theirs = row.metrics.psnr_y, other.metrics.psnr_y
            return None if ours is None or theirs is None else ours - theirs
    return None


def _best(row: TableRow, rows: Iterable[TableRow]) -> frozenset[str]:
    rivals = [other for other in rows if other.arch == row.arch and other.source not in WHOLE]
    if row.source in WHOLE or len(rivals) < 2:
        return frozenset()
    leading = set()
    for metric in METRICS:
        values = [value for other in rivals if (value := getattr(other.metrics, metric)) is not None]
        top = (min if metric == "lpips" else max)(values, default=None)
        if top is not None and getattr(row.metrics, metric) == top:
            leading.add(metric)
    return frozenset(leading)


def _over_seeds(group: list[SrResult], reduce: Callable[[list[float]], float | None]) -> Metrics:
    columns = {name: [getattr(result.metrics, name) for result in group] for name in METRICS}
    return Metrics(**{name: reduce([v for v in values if v is not None]) for name, values in columns.items()})


def spread(values: list[float]) -> float | None:
    """Sample standard deviation, or None of fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def plain_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text, the bicubic row first."""
    header = ["arch", "source", "budget", "iterations", "seeds", "params", *METRICS, "psnr_y_sd", "psnr_y_to_full"]
    rows = [_plain_row(row) for row in table_rows(report)]
    if report.bicubic:
        metrics = [number(getattr(report.bicubic, name), 4) for name in METRICS]
        rows.insert(0, ["bicubic", *[""] * 5, *metrics, "", ""])
    return header, rows


def _plain_row(row: TableRow) -> list[str]:
    facts = (row.arch, row.source, row.budget, row.iterations, row.seeds, row.params)
    metrics = [number(getattr(row.metrics, name), 4) for name in METRICS]
    last = ("" if value is None else f"{value:.4f}" for value in (row.spread.psnr_y, row.to_full))
    return [*("" if fact is None else str(fact) for fact in facts), *metrics, *last]


def as_csv(header: list[str], rows: list[list[str]]) -> str:
    """Comma-separated, with a header; what was not measured is empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([header, *([cell if cell != "–" else "" for cell in row] for row in rows)])
    return buffer.getvalue()


def as_markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table of pipes."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    """``value`` with so many decimals; an en dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"
