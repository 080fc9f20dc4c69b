"""The page of an experiment: what it shows, charts with a dot per seed, tables, and the training sets as pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import PackageLoader

from ddsr_core.baselines.names import RESTORED_LABEL
from ddsr_core.experiments.costs import COSTS_NOTE, cost_tables
from ddsr_core.experiments.design import REFERENCE, Cell, Design, seeds_note
from ddsr_core.experiments.markdown import WHOLE_COLUMN, Row, columns_of, rows_of
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.metrics.spec import METRICS, Metric
from ddsr_core.report.charts import Dots, SeedLine, dot_plot, seed_chart
from ddsr_core.report.figures import thumbnail_uri
from ddsr_core.report.page import page
from ddsr_core.report.statistics import LEAST_SEEDS, Level, half_width, is_positive

TEMPLATES = PackageLoader("ddsr_core.experiments", "templates")
#: Longest side of a contact sheet on the page, pixels.
SHEET_PX = 640
COLORS = 6


@dataclass(frozen=True)
class Table:
    """A table of the page: its heading, the cells of its head, and its rows."""

    heading: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class NetworkSection:
    """What the page shows of one network: (heading, SVG, legend of labels and colors) of each chart, and tables."""

    name: str
    anchor: str
    charts: list[tuple[str, str, list[tuple[str, int | None]]]]
    tables: list[Table]


@dataclass(frozen=True)
class Answer:
    """PSNR-Y of a training set minus that of random crops, seed by seed, with one network."""

    network: str
    variant: str
    gains: list[float]

    @property
    def mean(self) -> float:
        return sum(self.gains) / len(self.gains)

    @property
    def half_width(self) -> float | None:
        """Of the interval over seeds; None with too few of them."""
        return half_width(self.gains) if len(self.gains) >= LEAST_SEEDS else None

    @property
    def level(self) -> Level:
        """Whether the set is better or worse than random crops, or equal within the spread of seeds; else unknown."""
        if len(self.gains) < LEAST_SEEDS:
            return "unknown"
        if is_positive(self.gains):
            return "better"
        return "worse" if is_positive([-gain for gain in self.gains]) else "equal"

    def __str__(self) -> str:
        value = f"{self.mean:+.3f}".replace("-", "\N{MINUS SIGN}")
        interval = "" if self.half_width is None else f" ± {self.half_width:.3f}"
        return f"{self.variant}, {self.network}: {value}{interval} dB"


def experiment_page(
    cells: Sequence[Cell], bicubic: Mapping[str, float], design: Design, about: str, total: int, folder: Path
) -> str:
    """The page as text.

    Args:
        cells: measured so far, at least one.
        about: how the experiment was made.
        total: number of cells that the experiment will have.
        folder: with the contact sheets, ``sheet-*.png``.
    """
    answers = answers_of(cells, design)
    level, headline = _headline(answers)
    sheets = {path.stem.removeprefix("sheet-"): path for path in sorted(folder.glob("sheet-*.png"))}
    return page(
        "experiment.html.j2",
        TEMPLATES,
        name=design.name,
        title=design.title or f"Experiment {design.name}",
        about=about.replace("`", ""),
        level=level,
        headline=headline,
        answers=[str(answer) for answer in answers if answer.variant.startswith("distilled")],
        answer_chart=_answer_chart(answers, colors_of(design)),
        seeds=len({cell.seed for cell in cells}),
        done=len(cells),
        total=total,
        networks=[_section(cells, bicubic, design, name) for name in dict.fromkeys(cell.network for cell in cells)],
        sheets=[(name, thumbnail_uri(read_rgb(path), SHEET_PX)) for name, path in sheets.items()],
        note=seeds_note(cells),
        cost_tables=cost_tables(cells),
        costs_note=COSTS_NOTE,
        meanings={variant.name: variant.meaning.replace("`", "") for variant in design.variants},
        notes=design.notes,
    )


def answers_of(cells: Sequence[Cell], design: Design) -> list[Answer]:
    """Every training set against random crops, at the largest column that both have; without the reference itself."""
    answers = []
    for network in dict.fromkeys(cell.network for cell in cells):
        rows = {row.variant: row for row in rows_of(cells, design, network, "psnr_y")}
        reference = rows.pop(REFERENCE, None)
        for row in rows.values() if reference else ():
            shared = [column for column in columns_of([row]) if reference and column in reference.by_column]
            if reference and shared:
                mine, theirs = row.by_column[shared[-1]], reference.by_column[shared[-1]]
                gains = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
                if gains:
                    answers.append(Answer(network, row.variant, gains))
    return answers


def _headline(answers: Sequence[Answer]) -> tuple[Level, str]:
    """The answer for the distilled set, or else for the set with restored detail."""
    for variant in ("distilled", RESTORED_LABEL):
        levels = [answer.level for answer in answers if answer.variant == variant]
        if levels:
            level: Level = "unknown" if "unknown" in levels else levels[0] if len(set(levels)) == 1 else "equal"
            return level, HEADLINES[level].format(variant)
    return "unknown", "Every training set against random crops"


HEADLINES: Mapping[Level, str] = {
    "better": "The {} set is better than random crops with every network.",
    "worse": "The {} set is worse than random crops with every network.",
    "equal": "The {} set and random crops: no clear difference, or the networks disagree.",
    "unknown": f"Too few seeds to tell: at least {LEAST_SEEDS} are needed.",
}


def colors_of(design: Design) -> dict[str, int]:
    """The color of each training set in every chart of the page."""
    names = dict.fromkeys(variant.name for variant in design.variants)
    return {name: number % COLORS for number, name in enumerate(names)}


def _answer_chart(answers: Sequence[Answer], colors: Mapping[str, int]) -> str:
    rows = [Dots(f"{a.variant} ({a.network})", a.gains, a.mean, a.half_width, colors[a.variant]) for a in answers]
    title, label = "PSNR-Y of every training set minus that of random crops", "difference in PSNR-Y, dB (positive is better)"
    return dot_plot(rows, title=title, x_label=label, line=0.0, line_label="random crops")


def _section(cells: Sequence[Cell], bicubic: Mapping[str, float], design: Design, network: str) -> NetworkSection:
    metrics = [METRICS[name] for name in design.metrics if name in bicubic]
    charts, tables = [], []
    for metric in metrics:
        rows = rows_of(cells, design, network, metric.name)
        charts.append((metric.heading, *_chart(rows, bicubic[metric.name], design, network, metric)))
        tables.append(_table(rows, bicubic[metric.name], design, metric))
    return NetworkSection(network, re.sub(r"[^a-z0-9]+", "-", network.lower()), charts, tables)


def _chart(
    rows: Sequence[Row], bicubic: float, design: Design, network: str, metric: Metric
) -> tuple[str, list[tuple[str, int | None]]]:
    title, colors = f"{metric.label} of {network}", colors_of(design)
    if design.columns is None:
        dots = [
            Dots(row.variant, values, sum(values) / len(values), None, colors[row.variant])
            for row in rows
            if (values := [value for column in row.by_column.values() for value in column.values()])
        ]
        return dot_plot(dots, title=title, x_label=metric.heading, line=bicubic, line_label="bicubic"), []
    lines = [SeedLine("bicubic", level=(bicubic,))]
    for row in rows:
        points = [(column, list(own.values())) for column, own in row.by_column.items() if column is not None]
        level = [] if points else list(row.by_column[None].values())
        lines.append(SeedLine(row.variant, sorted(points), level, colors[row.variant]))
    x_label = "iterations" if design.columns == "iterations" else "training images"
    svg = seed_chart(lines, title=title, x_label=x_label, y_label=metric.heading)
    return svg, [(line.label, line.color) for line in lines]


def _table(rows: Sequence[Row], bicubic: float, design: Design, metric: Metric) -> Table:
    columns = columns_of(rows)
    names = [WHOLE_COLUMN if column is None else f"{column:,}" for column in columns]
    header = ["training set", *(names if design.columns else [metric.heading])]
    body = [[row.variant, *(_cell(row, column, metric) for column in columns)] for row in rows]
    if not design.columns:  # one number of images: the full data has a column of its own, which is not shown
        body = [[name, next(cell for cell in cells if cell)] for name, *cells in body]
    return Table(metric.heading, header, [*body, ["bicubic", metric.text(bicubic), *([""] * (len(header) - 2))]])


def _cell(row: Row, column: int | None, metric: Metric) -> str:
    spread = row.spread(column)
    return "" if spread is None else spread.text(metric.digits)
