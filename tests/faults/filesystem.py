"""A file system that fails: the n-th change of something below a folder raises an error, or ends the process."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

#: Exit code of a process that a fault has ended.
CRASHED = 77


class Faults:
    """Counts operations, and fails at one of them.

    Args:
        root: operations on files below it are counted.
        at: number of the operation that fails, from 1; 0 never fails.
        act: called at that operation with the path; raises, or does not return.
    """

    def __init__(self, root: Path, at: int = 0, act: Callable[[str], None] | None = None) -> None:
        self.root, self.at, self.act = os.fspath(root), at, act
        self.count = 0
        self.names: list[str] = []

    def below(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.abspath(os.fspath(path)).startswith(self.root + os.sep)

    def strikes(self, name: str, path: Any) -> bool:
        """Count an operation. Whether it is the one that fails."""
        self.count += 1
        self.names.append(f"{name} {os.path.basename(os.fspath(path))}")
        return self.count == self.at

    def fail(self, path: Any) -> None:
        assert self.act is not None
        self.act(os.fspath(path))


class _File:
    """A file that is open for writing. A write that fails has written half of its bytes."""

    def __init__(self, file: Any, path: Any, faults: Faults) -> None:
        self._file, self._path, self._faults = file, path, faults

    def write(self, data: Any) -> int:
        if self._faults.strikes("write", self._path):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            self._faults.fail(self._path)
        return int(self._file.write(data))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextmanager
def failing(faults: Faults) -> Iterator[Faults]:
    """Put the faults under everything that Python code does with files."""

    def wrapped(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if faults.below(path) and faults.strikes(name, path):
                faults.fail(path)
            return real(path, *args, **kwargs)

        return call

    real_open, real_fsync, real_os_open = io.open, os.fsync, os.open

    def open_file(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wax+") or not faults.below(path):
            return real_open(path, mode, *args, **kwargs)
        if faults.strikes("open", path):
            faults.fail(path)
        return _File(real_open(path, mode, *args, **kwargs), path, faults)

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if faults.below(path) and faults.strikes("fsync", path):
            faults.fail(path)
        real_fsync(descriptor)

    def os_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT and faults.below(path) and faults.strikes("os.open", path):
            faults.fail(path)
        return real_os_open(path, flags, *args, **kwargs)

    in_os = {name: wrapped(name) for name in ("replace", "rename", "mkdir", "unlink", "rmdir", "symlink")}
    with (
        mock.patch.object(io, "open", open_file),
        mock.patch.object(builtins, "open", open_file),
        mock.patch.multiple(os, open=os_open, fsync=fsync, **in_os),
    ):
        yield faults


def raising(number: int) -> Callable[[str], None]:
    """An error of the operating system."""

    def act(path: str) -> None:
        raise OSError(number, os.strerror(number), path)

    return act


def crash(path: str) -> None:
    """What a power cut leaves: nothing more happens."""
    os._exit(CRASHED)


ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
