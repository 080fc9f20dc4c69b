"""The tables of an experiment with columns as markdown: a table a network and metric, the paper's cells under ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ddsr_core.experiments.design import Cell, Design, Spread, seeds_note
from ddsr_core.experiments.paper_tables import paper_cells

#: Name, heading, digits.
METRICS: Mapping[str, tuple[str, int]] = {
    "psnr_y": ("PSNR-Y, dB", 3),
    "psnr_rgb": ("PSNR-RGB, dB", 3),
    "ssim_y": ("SSIM-Y", 4),
    "ssim_rgb": ("SSIM-RGB", 4),
    "lpips": ("LPIPS (lower is better)", 4),
    "lpips_vgg": ("LPIPS-VGG (lower is better)", 4),
    "dists": ("DISTS (lower is better)", 4),
}
#: Rows of differences: the first less the second, seed by seed.
PAIRS = tuple((ours, other) for ours in ("distilled", "near") for other in ("threshold", "random", "gsdd"))
WHOLE_COLUMN = "all"


@dataclass(frozen=True)
class Row:
    """A training set's values by column; column None is the whole data."""

    variant: str
    by_column: Mapping[int | None, Mapping[int, float]]  # column -> seed -> value

    def spread(self, column: int | None) -> Spread | None:
        """Over the seeds of a cell; None where there is nothing yet."""
        values = self.by_column.get(column)
        return Spread.of(list(values.values())) if values else None

    def less(self, other: Row, column: int | None) -> Spread | None:
        """Difference to another row over the seeds that both have."""
        mine, theirs = self.by_column.get(column, {}), other.by_column.get(column, {})
        both = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
        return Spread.of(both) if both else None


def column_of(cell: Cell, design: Design) -> int | None:
    """The column that a cell stands in."""
    return cell.iterations if design.columns == "iterations" else cell.images


def rows_of(cells: Iterable[Cell], design: Design, network: str, metric: str) -> list[Row]:
    """The rows of one network and metric, in the design's order."""
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
    """Every column of the rows, ascending, the whole data last."""
    found = {column for row in rows for column in row.by_column}
    counted: list[int | None] = [*sorted(column for column in found if column is not None)]
    return counted + ([None] if None in found else [])


def tables_markdown(cells: Sequence[Cell], bicubic: Mapping[str, float], design: Design, about: str) -> str:
    """Title, what it was made by, the tables, what the rows are, and the design's notes."""
    lines = [f"# {design.title}", "", about, ""]
    networks = list(dict.fromkeys(cell.network for cell in cells))
    for network in networks:
        for metric in (metric for metric in design.metrics if metric in bicubic):
            heading, digits = METRICS[metric]
            lines += [f"## {network}: {heading}", ""]
            lines += _table(rows_of(cells, design, network, metric), bicubic[metric], design, network, metric, digits)
            lines.append("")
    unit = "Columns are numbers of " + ("iterations." if design.columns == "iterations" else "training images.")
    lines += [f"{unit} {seeds_note(cells)}", ""]
    meanings = {variant.name: variant.meaning for variant in design.variants}
    lines += [f"- `{name}`: {meaning}" for name, meaning in meanings.items()]
    return "\n".join([*lines, "", *design.notes]).rstrip() + "\n"


def _table(rows: Sequence[Row], bicubic: float, design: Design, network: str, metric: str, digits: int) -> list[str]:
    columns = columns_of(rows)
    header = ["training set", *(WHOLE_COLUMN if column is None else f"{column:,}" for column in columns)]
    lines = [_line(header), _line(["---"] * len(header))]
    for row in rows:
        lines.append(_line([row.variant, *(_text(row.spread(column), digits) for column in columns)]))
        published = paper_cells(design.name, network, row.variant, metric) if design.with_paper else {}
        if published and any(column in published for column in columns):
            lines.append(_line(["*paper*", *(_number(published.get(column), digits) for column in columns)]))
    named = {row.variant: row for row in rows}
    for ours, other in ((a, b) for a, b in PAIRS if a in named and b in named):
        differences = [named[ours].less(named[other], column) for column in columns]
        lines.append(_line([f"{ours} - {other}", *(_text(value, digits, sign="+") for value in differences)]))
    lines.append(_line(["bicubic", f"{bicubic:.{digits}f}", *("" for _ in columns[1:])]))
    return lines


def _text(spread: Spread | None, digits: int, sign: str = "") -> str:
    if spread is None:
        return ""
    deviation = f" ± {spread.deviation:.{digits}f}" if spread.count > 1 else ""  # one seed has none
    return f"{spread.mean:{sign}.{digits}f}{deviation}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"*{value:.{min(digits, 4)}f}*"


def _line(values: Iterable[str]) -> str:
    return f"| {' | '.join(values)} |"
