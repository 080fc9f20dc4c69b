"""Parallel work: parts of a stage in other processes, prefetching on threads, and how a worker process starts.

A part leaves its results in the folder of the build that it belongs to (`ddsr_core.storage.stage.RESUME`), where a build
that continues after an interruption looks for them. The process that builds the artifact holds its lock and waits for the
parts, which need no lock of their own.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ddsr_core.errors import StorageError

T = TypeVar("T")
R = TypeVar("R")

#: Upper limit on the parts of one stage: enough to keep every worker busy, as each part costs its caller some bookkeeping.
MAX_PARTS = 128
PARENT_CHECK_S = 1.0
#: Processes that share this machine's memory, if this is a worker process.
_worker_processes = 1


class RunParts(Protocol):
    """Runs the parts of a stage's work in other processes, many at once."""

    def __call__(self, do: Callable[[Any], None], parts: Sequence[Any]) -> Iterator[None]:
        """Compute every part; yields once per finished part, in order.

        Args:
            do: a module-level function.
            parts: plain data, because it is sent to other processes.

        Raises:
            DdsrError: whatever a part raises.
        """
        ...


def in_parts(items: Sequence[T], smallest: int) -> list[Sequence[T]]:
    """Split into runs of consecutive items, at least ``smallest`` in each but the last, and at most `MAX_PARTS` runs.

    >>> in_parts("abcde", 2)
    ['ab', 'cd', 'e']
    """
    size = max(smallest, -(-len(items) // MAX_PARTS))
    return [items[start : start + size] for start in range(0, len(items), size)]


def check_shared(folder: Path) -> None:
    """Check, before a part begins, that the folder of its build can be seen from this machine.

    Raises:
        StorageError: it cannot.
    """
    if not folder.is_dir():
        raise StorageError(
            "the folder of this build is not on the machine that computes a part of it",
            where=folder,
            fix="put the home on a file system that all machines share, or choose another runner",
        )


def prefetch(function: Callable[[T], R], items: Iterable[T], workers: int, in_flight: int | None = None) -> Iterator[R]:
    """``map`` on threads that work ahead of the caller; results come in order.

    Args:
        function: runs on the threads.
        items: consumed only as far as results are in flight.
        workers: number of threads.
        in_flight: most results that are computed but not yet consumed, which bounds memory; default ``2 * workers``.
    """
    limit = 2 * workers if in_flight is None else in_flight
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= limit:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class MemoryBudget:
    """Memory that the threads of this process share, and that worker processes divide among them.

    Args:
        total: bytes.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, amount: int) -> Iterator[None]:
        """Hold ``amount`` bytes; wait until they are free. A larger amount than the total waits until it is the only one."""
        limit = self.total // _worker_processes
        amount = min(amount, limit)
        with self._changed:
            self._changed.wait_for(lambda: self._used + amount <= limit)
            self._used += amount
        try:
            yield
        finally:
            with self._changed:
                self._used -= amount
                self._changed.notify_all()


def begin_worker(workers: int, parent: int) -> None:
    """Give this worker process its share of the cores, and end it when its parent process ends.

    Args:
        workers: number of processes that share the cores.
        parent: process id of the command that started the worker.
    """
    global _worker_processes
    _worker_processes = workers
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by torch when it is imported
    if "torch" in sys.modules:
        import torch  # only if already imported: importing it would slow down every worker

        torch.set_num_threads(threads)


def end_with_parent(parent: int) -> None:
    """Wait until the parent process is gone, then end this process at once.

    Its results are no longer needed; the next run continues unfinished work.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)
