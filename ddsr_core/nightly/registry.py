"""Series of distilled sets: which version is active, which were active before, and why each was promoted or not.

``<home>/nightly/<name>/registry.json`` is the history. Beside it, ``current/`` holds the active version's set, to train on,
and ``photos/0001.json`` lists the photos that version 1 was made from. Whoever changes the registry holds its lock
(`changing`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, computed_field

from ddsr_core.errors import ConfigError, InputError, StorageError
from ddsr_core.metrics.spec import METRICS, MetricName
from ddsr_core.storage.files import now, sealed, unsealed
from ddsr_core.storage.store import LOG, Store

FOLDER, FILE = "nightly", "registry.json"


class Version(BaseModel):
    """One distilled set that was made and measured.

    Attributes:
        number: counted from 1.
        run: name of its run below ``runs/``, which has the report.
        made: UTC, ISO 8601.
        photos: digest of the training photos.
        test: digest of the test photos.
        config: digest of the settings.
        changes: photos and patches that were new, kept and dropped since the last version.
        anew: how many photos were scored and patches embedded for it; the others were known.
        keys: stage -> key of the artifacts that later nights need (clusters, finetune, sample).
        warm_from: number of the version whose adapter fine-tuning continued from; None: from the base.
        metric: metric that versions are compared by.
        score: mean of the metric over SR networks trained on this version.
        against: the same for the version that was active then; None if there was none.
        promoted: whether it became the active version.
        reason: why, or why not.
    """

    model_config = ConfigDict(frozen=True)
    number: int
    run: str
    made: str
    photos: str
    test: str
    config: str
    changes: dict[str, dict[str, int]]
    anew: dict[str, int]
    keys: dict[str, str]
    warm_from: int | None
    metric: MetricName
    score: float
    against: float | None
    promoted: bool
    reason: str


class ActivePeriod(BaseModel):
    """A period in which one version is active. It ends when the next one begins.

    Attributes:
        since: UTC, ISO 8601.
        why: ``promoted``, or that a rollback restored it.
    """

    model_config = ConfigDict(frozen=True)
    version: int
    since: str
    why: str


class Registry(BaseModel):
    """All versions and all periods in which one was active, oldest first."""

    model_config = ConfigDict(frozen=True)
    versions: tuple[Version, ...] = ()
    #: Files written before 0.1.0 call it `reigns`.
    active_periods: tuple[ActivePeriod, ...] = Field((), validation_alias=AliasChoices("active_periods", "reigns"))

    @computed_field  # type: ignore[prop-decorator]
    @property
    def active(self) -> int | None:
        """Number of the active version."""
        return self.active_periods[-1].version if self.active_periods else None

    @property
    def active_version(self) -> Version | None:
        """The active version."""
        return None if self.active is None else self.version(self.active)

    @property
    def last(self) -> Version | None:
        """The latest version, promoted or not."""
        return self.versions[-1] if self.versions else None

    @property
    def next_number(self) -> int:
        """Number of the next version."""
        return self.last.number + 1 if self.last else 1

    @property
    def lineage(self) -> tuple[int, ...]:
        """The versions that rollbacks would restore one after another, oldest first, and the active version.

        A rollback to a version forgets what was active after it: after 1, 2, 3, a rollback to 1 and a promotion of 4, the
        lineage is 1, 4.
        """
        lineage: list[int] = []
        for period in self.active_periods:
            before = lineage[: lineage.index(period.version)] if period.version in lineage else lineage
            lineage = [*before, period.version]
        return tuple(lineage)

    def recent(self, count: int | None) -> set[int]:
        """The last ``count`` versions and the last ``count`` of the lineage, at least one of each. None: all versions."""
        numbers = [item.number for item in self.versions]
        if count is None:
            return set(numbers)
        return {*numbers[-max(1, count) :], *self.lineage[-max(1, count) :]}

    def version(self, number: int) -> Version:
        """The version with this number.

        Raises:
            InputError: there is none.
        """
        version = next((item for item in self.versions if item.number == number), None)
        if version is None:
            known = ", ".join(str(item.number) for item in self.versions) or "none yet"
            raise InputError(f"there is no version {number}", fix=f"Choose one of the versions of this series: {known}.")
        return version

    def with_version(self, version: Version) -> Registry:
        """The registry with a new version, which becomes active if it was promoted."""
        promoted = (ActivePeriod(version=version.number, since=now(), why="promoted"),) if version.promoted else ()
        return Registry(versions=(*self.versions, version), active_periods=(*self.active_periods, *promoted))

    def rolled_back(self, to: int | None = None) -> Registry:
        """The registry with an earlier version active again.

        Args:
            to: number of that version; None: the one that was active before.

        Raises:
            InputError: there is no such version.
        """
        if to is None:
            if len(self.lineage) < 2:
                raise InputError(
                    "no earlier version was active",
                    where=f"active version: {self.active or 'none'}",
                    fix="Name a version: `ddsr versions` lists them.",
                )
            to = self.lineage[-2]
        if self.version(to).number == self.active:
            return self
        period = ActivePeriod(version=to, since=now(), why=f"rolled back from version {self.active}")
        return Registry(versions=self.versions, active_periods=(*self.active_periods, period))


def should_promote(metric: MetricName, candidate: float, active: float | None, margin: float) -> tuple[bool, str]:
    """Decide whether a candidate becomes the active version, and say why.

    Args:
        candidate: score of the candidate.
        active: score of the active version; None if there is none.
        margin: how much worse the candidate may be, in the unit of the metric.

    >>> should_promote("psnr_y", 26.40, 26.45, margin=0.1)
    (True, 'psnr_y 26.4000 is not worse than 26.4500 by more than 0.1')
    >>> should_promote("lpips", 0.46, 0.45, margin=0.0)
    (False, 'lpips 0.4600 is worse than 0.4500 by more than 0.0')
    """
    if active is None:
        return True, "the first version"
    loss = -METRICS[metric].gain(candidate, active)
    verdict = "is worse" if loss > margin else "is not worse"
    return loss <= margin, f"{metric} {candidate:.4f} {verdict} than {active:.4f} by more than {margin}"


def read_registry(store: Store, name: str) -> Registry:
    """The registry of a series; empty if it has no version yet.

    Raises:
        ConfigError: the series cannot have this name.
        StorageError: the file is damaged.
    """
    path = f"{folder_of(name)}/{FILE}"
    data = store.read_file(path)
    if data is None:
        return Registry()
    where, fix = f"{store.url}/{path}", "restore the file from a backup"
    record = unsealed(data, where, fix)
    try:
        return Registry.model_validate(record)
    except ValueError as error:
        raise StorageError("the file is damaged", where=where, fix=fix) from error


@contextmanager
def changing(store: Store, name: str) -> Iterator[Registry]:
    """The registry, locked against changes by others. Hold it briefly."""
    with store.locked(f"{folder_of(name)}/registry", what=f"the registry of {name!r}, changed"):
        yield read_registry(store, name)


def write_registry(store: Store, name: str, registry: Registry) -> None:
    """Write the registry, for all machines that share the home."""
    store.write_file(f"{folder_of(name)}/{FILE}", _json(sealed(registry.model_dump(mode="json"))))


def registry_names(store: Store) -> list[str]:
    """The series of a home, including those whose first night is still running."""
    return sorted({path.split("/")[0] for path in store.sizes(FOLDER) if "/" in path})


def write_photos(store: Store, name: str, number: int, photos: Mapping[str, str]) -> None:
    """Record which photos a version is made from: name -> digest of the content."""
    store.write_file(_photos_file(name, number), _json(sealed({"photos": dict(photos)})))


def read_photos(store: Store, name: str, number: int) -> dict[str, str] | None:
    """What `write_photos` recorded; None if the file is gone or damaged. Nothing but the number of changes depends on it."""
    path = _photos_file(name, number)
    data = store.read_file(path)
    if data is None:
        return None
    try:
        record = unsealed(data, f"{store.url}/{path}", "remove it")
    except StorageError as error:
        LOG.warning("%s", error)
        return None
    return dict(record.get("photos", record))


def _photos_file(name: str, number: int) -> str:
    return f"{folder_of(name)}/photos/{number:04d}.json"


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def folder_of(name: str) -> str:
    """``nightly/<name>``, relative to the home.

    Raises:
        ConfigError: the name has characters that a folder or the key of a Prefect artifact cannot have.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        fix = "Use letters, digits, - and _; begin with a letter or a digit."
        raise ConfigError(f"{name!r} cannot be the name of a series", where="name", fix=fix)
    return f"{FOLDER}/{name}"


def night_lock(name: str) -> str:
    """The lock that a night holds, relative to the home."""
    return f"{folder_of(name)}/night"
