"""Work in parts: what a stage does photo by photo or batch by batch can be done in other processes or on other machines.

A part leaves its results in the folder of the build that it is a part of (`store.RESUME`), as a build that goes on after
a kill finds them there. Who builds the artifact holds its lock and waits; those who do the parts need none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ddsr_core.errors import StorageError

T = TypeVar("T")

#: However large the work, so many parts keep every worker busy, and each costs its caller some book-keeping.
MOST_PARTS = 128


class Spread(Protocol):
    """Does parts of a stage's work elsewhere, many at once."""

    def __call__(self, do: Callable[[Any], None], parts: Sequence[Any]) -> Iterator[None]:
        """Do every part; yields once a part, in their order, when it is done.

        Args:
            do: a function of a module.
            parts: plain data, as they go to other processes.

        Raises:
            DdsrError: whatever a part raises.
        """
        ...


def in_parts(items: Sequence[T], smallest: int) -> list[Sequence[T]]:
    """Consecutive items, at least ``smallest`` a part but the last, and at most `MOST_PARTS` parts.

    >>> in_parts("abcde", 2)
    ['ab', 'cd', 'e']
    """
    size = max(smallest, -(-len(items) // MOST_PARTS))
    return [items[start : start + size] for start in range(0, len(items), size)]


def check_shared(folder: Path) -> None:
    """What a part does first.

    Raises:
        StorageError: the folder of the build is not on this machine.
    """
    if not folder.is_dir():
        raise StorageError(
            "the folder of this build is not on the machine that does a part of it",
            where=folder,
            mend="put the home on a file system that all machines share, or choose another runner",
        )
