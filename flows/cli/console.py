"""What a run looks like on a terminal (bars with rate and ETA) and in a pipe (plain lines)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ddsr_core.progress import Bar, ProgressFactory

LINE_EVERY_SECONDS = 10.0


def progress_for(stream: Any = None) -> ProgressFactory:
    """Bars where ``stream`` (default: standard error) is a terminal, else plain lines."""
    stream = stream or sys.stderr
    return _bars if stream.isatty() else _lines


class _RichBar:
    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: int = 1) -> None:
        self._progress.advance(self._task, amount)

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=text)


@contextmanager
def _bars(title: str, *, total: int, unit: str = "items", done: int = 0) -> Iterator[Bar]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.1f} {unit}/s" if speed else "", style="progress.data.speed")

    columns = (
        TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), Rate(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield _RichBar(progress, progress.add_task(title, total=total, completed=min(done, total), note=""))


class _LineBar:
    def __init__(self, title: str, total: int, unit: str, done: int) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self.first, self.started, self.printed, self.text = done, time.monotonic(), time.monotonic(), ""

    def advance(self, amount: int = 1) -> None:
        self.done += amount
        if time.monotonic() - self.printed >= LINE_EVERY_SECONDS:
            self.print()

    def note(self, text: str) -> None:
        self.text = text

    def print(self) -> None:
        self.printed = time.monotonic()
        seconds = max(self.printed - self.started, 1e-9)
        rate = (self.done - self.first) / seconds
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
    rows: list[dict[str, Any]], title: str = "SR networks on the test photos (x4)", origin: str = "trained on"
) -> None:
    """The table of SR results on standard output; metrics that no row has are left out, but for the usual five."""
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return
    table = Table(title=title)
    heads = {
        "psnr_y": "PSNR-Y dB",
        "ssim_y": "SSIM-Y",
        "psnr_rgb": "PSNR-RGB",
        "ssim_rgb": "SSIM-RGB",
        "lpips": "LPIPS ↓",
    }
    more = {"lpips_vgg": "LPIPS-vgg ↓", "dists": "DISTS ↓"}
    heads |= {name: head for name, head in more.items() if any(name in row for row in rows)}
    table.add_column("network")
    table.add_column(origin)
    for head in heads.values():
        table.add_column(head, justify="right")
    for row in rows:
        digits = {"psnr_y": 2, "psnr_rgb": 2}
        cells = ["-" if row.get(name) is None else f"{row[name]:.{digits.get(name, 4)}f}" for name in heads]
        table.add_row(row["arch"], row["source"], *cells)
    Console(width=None if sys.stdout.isatty() else 110).print(table)
