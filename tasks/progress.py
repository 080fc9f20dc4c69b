"""How a stage shows its progress inside a task. The caller chooses, outside of Prefect's parameters.

Task parameters must be plain data, and a progress bar is not. By default, as in a run started from the UI, a line is
written to the run's log every ten seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from ddsr_core.progress import Bar, ProgressFactory
from tasks.run_pages import artifact_key

LOG_EVERY_SECONDS = 10.0


class _LoggedBar:
    def __init__(self, title: str, total: int, unit: str, done: int, logger: Any) -> None:
        self.title, self.total, self.unit, self.done, self.logger = title, total, unit, done, logger
        self.text, self.logged = "", time.monotonic()
        self.artifact: UUID | None = None

    def advance(self, amount: int = 1) -> None:
        self.done += amount
        if time.monotonic() - self.logged >= LOG_EVERY_SECONDS:
            self.log()
            self.show()

    def note(self, text: str) -> None:
        self.text = text

    def log(self) -> None:
        self.logged = time.monotonic()
        self.logger.info("%s: %d/%d %s %s", self.title, self.done, self.total, self.unit, self.text)

    def show(self) -> None:
        """Update the progress artifact. There is none in the first `LOG_EVERY_SECONDS`."""
        try:
            self.publish(100 * self.done / max(1, self.total))
        except httpx.HTTPError as error:  # must not stop the computation
            self.logger.warning("progress is not shown: the Prefect server does not answer (%s)", error)

    def publish(self, percent: float) -> None:
        if self.artifact is None:
            key = f"ddsr-{artifact_key(self.title)}"
            self.artifact = create_progress_artifact(percent, key=key, description=f"{self.title}, {self.unit}")  # type: ignore[assignment]
        else:
            update_progress_artifact(self.artifact, percent)


@contextmanager
def logged(title: str, *, total: int, unit: str = "items", done: int = 0) -> Iterator[Bar]:
    """A `ProgressFactory` that writes to the log of the current Prefect run."""
    bar = _LoggedBar(title, total, unit, done, get_run_logger())
    yield bar
    bar.log()
    if bar.artifact is not None:
        bar.show()


current: ContextVar[ProgressFactory] = ContextVar("ddsr_progress", default=logged)
