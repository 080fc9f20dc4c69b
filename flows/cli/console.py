"""Progress and results on the terminal: bars with rate and ETA, or plain lines where the output is a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ddsr_core.metrics.spec import METRICS
from ddsr_core.progress import Bar, ProgressFactory

LINE_EVERY_SECONDS = 10.0
#: What is reported as done in the first moments was done by an earlier run: the rate does not count it.
RESUME_SECONDS = 1.0
#: Width of tables where the output is a pipe, characters.
PIPE_WIDTH = 110


def progress_for(stream: Any = None) -> ProgressFactory:
    """Bars if ``stream`` (default: standard error) is a terminal, else plain lines."""
    stream = stream or sys.stderr
    return _bars if stream.isatty() else _lines


class _RichBar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self._begun: float | None = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        if self._begun is not None and time.monotonic() - self._begun >= RESUME_SECONDS:
            self._begun = None
            done = next(task.completed for task in self._progress.tasks if task.id == self._task)
            self._progress.reset(self._task, completed=int(done))  # forgets the rate of the first moments
        self._progress.advance(self._task, amount)

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=text)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} {self.unit}/s" if speed else "", style="progress.data.speed")


@contextmanager
def _bars(title: str, *, total: int, unit: str = "items", done: int = 0) -> Iterator[Bar]:
    columns = (
        TextColumn("{task.description:<24}", markup=False), BarColumn(), MofNCompleteColumn(), _Rate(unit),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield _RichBar(progress, progress.add_task(title, total=total, completed=min(done, total), note=""))


class _LineBar:
    def __init__(self, title: str, total: int, unit: str, done: int) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self.begun_at = self.first = done
        self.started = self.measured_from = self.printed = time.monotonic()
        self.text = ""

    def advance(self, amount: int = 1) -> None:
        self.done += amount
        if time.monotonic() - self.started < RESUME_SECONDS:
            self.first, self.measured_from = self.done, time.monotonic()
        if time.monotonic() - self.printed >= LINE_EVERY_SECONDS:
            self.print()

    def note(self, text: str) -> None:
        self.text = text

    def print(self) -> None:
        self.printed = time.monotonic()
        seconds = max(self.printed - self.started, 1e-9)
        if self.done > self.first:
            rate = (self.done - self.first) / max(self.printed - self.measured_from, 1e-9)
        else:  # all of it in the first moments
            rate = (self.done - self.begun_at) / seconds
        left = f", {(self.total - self.done) / rate:.0f} s left" if rate > 0 and self.done < self.total else ""
        note = f" ({self.text})" if self.text else ""
        line = f"{self.title}: {self.done}/{self.total} {self.unit}, {rate:.1f}/s, {seconds:.1f} s{left}{note}"
        print(line, file=sys.stderr, flush=True)


@contextmanager
def _lines(title: str, *, total: int, unit: str = "items", done: int = 0) -> Iterator[Bar]:
    bar = _LineBar(title, total, unit, done)
    yield bar
    bar.print()


def print_results(
    rows: Sequence[Mapping[str, Any]], title: str = "SR networks on the test photos (x4)", origin: str = "trained on"
) -> None:
    """Print a table of SR results: the default metrics, and others if a row has them.

    Args:
        rows: ``arch``, ``source``, metrics by name, and a ``label`` if tables call the source otherwise. Bicubic is a row.
        origin: heading of the column of sources.
    """
    if not rows:
        return
    table = Table(title=Text(title))  # not markup: names may have brackets
    table.add_column("network")
    table.add_column(origin)
    metrics = [metric for metric in METRICS.values() if metric.default or any(metric.name in row for row in rows)]
    for metric in metrics:
        table.add_column(metric.heading, justify="right")
    for row in rows:
        cells = (row["arch"], row.get("label", row["source"]), *(metric.text(row.get(metric.name)) for metric in metrics))
        table.add_row(*map(Text, cells))
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)
