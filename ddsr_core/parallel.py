"""Work side by side: parts of a stage in other processes, reading ahead on threads, and what a worker process does first.

A part leaves its results in the folder of the build that it is a part of (`store.RESUME`), as a build that goes on after
a kill finds them there. Who builds the artifact holds its lock and waits; those who do the parts need none.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ddsr_core.errors import StorageError

T = TypeVar("T")
R = TypeVar("R")

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
            fix="put the home on a file system that all machines share, or choose another runner",
        )


def map_ahead(function: Callable[[T], R], items: Iterable[T], workers: int, ahead: int | None = None) -> Iterator[R]:
    """``map`` on a few threads, in order.

    Args:
        ahead: results in flight at most, so that memory stays flat; ``2 * workers`` if not given.
    """
    limit = 2 * workers if ahead is None else ahead
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= limit:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


PARENT_CHECK_S = 1.0


def begin_worker(workers: int, parent: int) -> None:
    """Take a share of the cores, and end when the command that started it has ended, however it did.

    Args:
        workers: processes that share the cores.
        parent: process id.
    """
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for torch, if it is imported at all
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)


def end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)  # nobody waits for what it does; what it has begun goes on in the next run
