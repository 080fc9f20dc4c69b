"""Errors while reading a weights file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddsr_core.errors import InputError


@contextmanager
def readable(file: Path, fix: str) -> Iterator[None]:
    """Turn whatever the readers of safetensors and ``.pth`` raise into an `InputError`.

    Every exception is caught: damaged bytes make the interpreter of ``.pth`` files raise any exception, such as
    struct.error or KeyError.

    Args:
        file: named in the message.
        fix: what the user can do.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot read weights: {reason}", where=file, fix=fix) from error
