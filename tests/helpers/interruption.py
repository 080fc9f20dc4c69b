"""Cutting a stage off in the middle, and comparing what two runs left."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddsr_core.config import Runtime
from ddsr_core.progress import Bar


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file() and "resume" not in p.relative_to(folder).parts)
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


class Killed(BaseException):
    """Like a signal: nothing in the library catches it."""


def killing_after(title: str, amount: int) -> Runtime:
    """A runtime that is cut off when the work named ``title`` has advanced so far."""

    class Killer:
        done = 0

        def advance(self, amount_done: int = 1) -> None:
            self.done += amount_done
            if self.done >= amount:
                raise Killed

        def note(self, text: str) -> None:
            pass

    @contextmanager
    def progress(name: str, *, total: int, unit: str = "items", done: int = 0) -> Iterator[Bar]:
        killer = Killer()
        if name != title:
            killer.done = -(10**9)
        yield killer

    return Runtime(progress=progress)
