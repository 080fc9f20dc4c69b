"""The one exception family. A message says what happened, where, and how to fix it."""

from __future__ import annotations

from functools import partial
from typing import Any


class DdsrError(Exception):
    """Base of every error that a user can cause or fix.

    Args:
        what: what happened, one sentence.
        where: file, config field, row or stage that it happened in.
        fix: what the user can do about it.
    """

    def __init__(self, what: str, *, where: object | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, None if where is None else str(where), fix
        lines = [what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if fix:
            lines.append(f"  fix:   {fix}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors come back whole from other processes."""
        return partial(type(self), where=self.where, fix=self.fix), (self.what,)


class ConfigError(DdsrError):
    """An unknown preset, field, architecture, or a value out of range."""


class InputError(DdsrError):
    """Images, data sets or weights that cannot be used as they are."""


class MissingWeightsError(InputError):
    """Weights that are neither on disk nor reachable; the message names the exact files to bring."""


class TrainingError(DdsrError):
    """A training run that must not go on, such as a loss that is not finite."""


class StorageError(DdsrError):
    """The home folder cannot be read or written: permissions, a full disk, a damaged artifact."""


class UnreachableError(StorageError):
    """A home on S3 does not answer: worth another try."""
