"""The package's exceptions. Every message says what happened, where, and how to fix it."""

from __future__ import annotations

from functools import partial
from typing import Any


class DdsrError(Exception):
    """Base of every error that a user can cause or fix.

    Args:
        what: what happened, in one sentence.
        where: the file, config field, row or stage concerned.
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
        """Pickle all three parts, so that an error arrives complete from another process."""
        return partial(type(self), where=self.where, fix=self.fix), (self.what,)


class ConfigError(DdsrError):
    """An unknown preset, field, architecture, or a value out of range."""


class InputError(DdsrError):
    """Images, data sets or weights that cannot be used as they are."""


class ChangedInputError(InputError):
    """An input changed while a stage read it. Nothing of that build can be reused."""


class MissingWeightsError(InputError):
    """Weights that are neither on disk nor downloadable; the message names the exact files to supply."""


class TrainingError(DdsrError):
    """A training run that cannot continue, for example because its loss is not finite."""


class StorageError(DdsrError):
    """The home folder cannot be read or written: missing permissions, a full disk, a damaged artifact."""


class UnreachableError(StorageError):
    """A home on S3 does not answer. Trying again may help."""
