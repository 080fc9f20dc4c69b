"""Markdown of an experiment with columns: one table per network and metric, with the paper's cells under ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ddsr_core.baselines.names import RESTORED_CROPS, RESTORED_LABEL, TRAINING_SETS
from ddsr_core.experiments.design import Cell, Design, Spread, legend, markdown_row, seeds_note
from ddsr_core.experiments.paper_tables import NEAR_COPIES, paper_cells
from ddsr_core.metrics.spec import METRICS, Metric

#: Rows of differences: the first minus the second, seed by seed.
PAIRS = (
    *((RESTORED_LABEL, TRAINING_SETS[kind].label) for kind in RESTORED_CROPS),
    *((ours, other) for ours in (RESTORED_LABEL, "distilled", NEAR_COPIES) for other in ("threshold", "random", "gsdd")),
)
#: Heading of the column of the full data.
WHOLE_COLUMN = "all"


@dataclass(frozen=True)
class Row:
    """The values of one training set by column; column None is the full data."""

    variant: str
    by_column: Mapping[int | None, Mapping[int, float]]  # column -> seed -> value

    def spread(self, column: int | None) -> Spread | None:
        """Mean and deviation over the seeds of a cell; None if it has not been measured yet."""
        values = self.by_column.get(column)
        return Spread.of(list(values.values())) if values else None

    def minus(self, other: Row, column: int | None) -> Spread | None:
        """Difference to another row, over the seeds that both have."""
        mine, theirs = self.by_column.get(column, {}), other.by_column.get(column, {})
        both = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
        return Spread.of(both) if both else None


def column_of(cell: Cell, design: Design) -> int | None:
    """The column that a cell belongs to."""
    return cell.iterations if design.columns == "iterations" else cell.images


def rows_of(cells: Iterable[Cell], design: Design, network: str, metric: str) -> list[Row]:
    """The rows of one network and metric, in the order of the design."""
    mine = [cell for cell in cells if cell.network == network and metric in cell.metrics]
    rows = []
    for variant in dict.fromkeys(variant.name for variant in design.variants):
        by_column: dict[int | None, dict[int, float]] = {}
        for cell in mine:
            if cell.variant == variant:
                by_column.setdefault(column_of(cell, design), {})[cell.seed] = cell.metrics[metric]
        if by_column:
            rows.append(Row(variant, by_column))
    return rows


def columns_of(rows: Sequence[Row]) -> list[int | None]:
    """Every column of the rows in ascending order, the full data last."""
    columns = {column for row in rows for column in row.by_column}
    counted: list[int | None] = [*sorted(column for column in columns if column is not None)]
    return counted + ([None] if None in columns else [])


def tables_markdown(cells: Sequence[Cell], bicubic: Mapping[str, float], design: Design, about: str) -> str:
    """Title, how the tables were made, the tables, the legend, and the design's notes."""
    lines = [f"# {design.title}", "", about, ""]
    for network in dict.fromkeys(cell.network for cell in cells):
        for metric in (METRICS[name] for name in design.metrics if name in bicubic):
            lines += [f"## {network}: {metric.heading}", ""]
            lines += _table(rows_of(cells, design, network, metric.name), bicubic[metric.name], design, network, metric)
            lines.append("")
    unit = "Columns are numbers of " + ("iterations." if design.columns == "iterations" else "training images.")
    lines += [f"{unit} {seeds_note(cells)}", "", *legend(design)]
    return "\n".join([*lines, "", *design.notes]).rstrip() + "\n"


def _table(rows: Sequence[Row], bicubic: float, design: Design, network: str, metric: Metric) -> list[str]:
    columns = columns_of(rows)
    header = ["training set", *(WHOLE_COLUMN if column is None else f"{column:,}" for column in columns)]
    lines = [markdown_row(header), markdown_row(["---"] * len(header))]
    for row in rows:
        lines.append(markdown_row([row.variant, *(_text(row.spread(column), metric) for column in columns)]))
        shown = row.variant in design.paper_rows
        published = paper_cells(design.name, network, row.variant, metric.name) if shown else {}
        if published and any(column in published for column in columns):
            lines.append(markdown_row(["*paper*", *(_published(published.get(column), metric) for column in columns)]))
    by_name = {row.variant: row for row in rows}
    for ours, other in ((a, b) for a, b in PAIRS if a in by_name and b in by_name):
        differences = [by_name[ours].minus(by_name[other], column) for column in columns]
        lines.append(markdown_row([f"{ours} - {other}", *(_text(value, metric, sign="+") for value in differences)]))
    lines.append(markdown_row(["bicubic", metric.text(bicubic), *("" for _ in columns[1:])]))
    return lines


def _text(spread: Spread | None, metric: Metric, sign: str = "") -> str:
    return "" if spread is None else spread.text(metric.digits, sign)


def _published(value: float | None, metric: Metric) -> str:
    return "" if value is None else f"*{metric.text(value)}*"
