"""Progress as an interface: the library reports it, the caller (CLI, Prefect, tests) decides how to show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Bar(Protocol):
    """The progress of one task."""

    def advance(self, amount: int = 1) -> None:
        """Report that ``amount`` more units are done."""

    def note(self, text: str) -> None:
        """Show a short text, such as the current loss, beside the bar."""


#: ``progress("Scoring photos", total=100, unit="photos", done=0)`` -> context manager that yields a `Bar`.
ProgressFactory = Callable[..., AbstractContextManager[Bar]]


class _SilentBar:
    def advance(self, amount: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


@contextmanager
def silent(title: str, *, total: int, unit: str = "items", done: int = 0) -> Iterator[Bar]:
    """A `ProgressFactory` that shows nothing."""
    yield _SilentBar()
