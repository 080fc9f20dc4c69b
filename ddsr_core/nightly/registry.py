"""Distilled sets in series: which one is in use (the champion), what came before it, and why each was taken or not.

``<home>/nightly/<name>/registry.json`` is the history, ``current/`` beside it the champion's set, to be trained on, and
``photos/0001.json`` … say which photos a version was made from. Whoever changes the registry holds its lock (`changing`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, computed_field

from ddsr_core.errors import ConfigError, InputError
from ddsr_core.storage.files import now
from ddsr_core.storage.store import Store

Metric = Literal["psnr_y", "psnr_rgb", "ssim_y", "ssim_rgb", "lpips"]
#: Of these, less is better.
LOWER_IS_BETTER = frozenset({"lpips"})
FOLDER, FILE = "nightly", "registry.json"


class Version(BaseModel):
    """One distilled set that was made and measured.

    Attributes:
        run: its run below ``runs/``, with the report.
        made: UTC, ISO 8601.
        photos, test, config: digests of what it was made from, measured on, and of the settings.
        changes: photos and patches that were new, kept and dropped since the last version.
        anew: photos that were scored for it and patches that were embedded; the others were known.
        keys: stage -> key of the artifacts that others go on from (clusters, finetune, sample).
        warm_from: number of the version whose adapter fine-tuning went on from.
        score: of SR networks trained on it, in the unit of the metric; ``against``: of the champion of that day.
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
    metric: Metric
    score: float
    against: float | None
    promoted: bool
    reason: str


class ActivePeriod(BaseModel):
    """A time in which one version is in use; it ends where the next one begins.

    Attributes:
        since: UTC, ISO 8601.
        why: it was promoted, or put back.
    """

    model_config = ConfigDict(frozen=True)
    version: int
    since: str
    why: str


class Registry(BaseModel):
    """All versions and all reigns, oldest first."""

    model_config = ConfigDict(frozen=True)
    versions: tuple[Version, ...] = ()
    reigns: tuple[ActivePeriod, ...] = ()

    @computed_field  # type: ignore[prop-decorator]
    @property
    def champion(self) -> int | None:
        """Number of the version in use."""
        return self.reigns[-1].version if self.reigns else None

    @property
    def current(self) -> Version | None:
        """The version in use."""
        return None if self.champion is None else self.version(self.champion)

    @property
    def last(self) -> Version | None:
        """The version that was made last, promoted or not."""
        return self.versions[-1] if self.versions else None

    @property
    def next_number(self) -> int:
        """Of the version that is made next."""
        return self.last.number + 1 if self.last else 1

    @property
    def line(self) -> tuple[int, ...]:
        """The champion and, before it, those that one would go back to step by step.

        Going back to a version forgets what came after it: of 1, 2, 3, back to 1 and then 4, the line is 1, 4.
        """
        line: list[int] = []
        for reign in self.reigns:
            before = line[: line.index(reign.version)] if reign.version in line else line
            line = [*before, reign.version]
        return tuple(line)

    def recent(self, count: int | None) -> set[int]:
        """The last ``count`` versions, and the last ``count`` of the line; none: all versions.

        At least the champion and the last version.
        """
        numbers = [item.number for item in self.versions]
        if count is None:
            return set(numbers)
        return {*numbers[-max(1, count) :], *self.line[-max(1, count) :]}

    def version(self, number: int) -> Version:
        """
        Raises:
            InputError: there is none of that number.
        """
        found = next((item for item in self.versions if item.number == number), None)
        if found is None:
            known = ", ".join(str(item.number) for item in self.versions) or "none yet"
            raise InputError(f"there is no version {number}", fix=f"versions here: {known}")
        return found

    def with_version(self, version: Version) -> Registry:
        """The registry with a new version, which is the champion if it was promoted."""
        reigns = (
            (*self.reigns, ActivePeriod(version=version.number, since=now(), why="promoted"))
            if version.promoted
            else self.reigns
        )
        return Registry(versions=(*self.versions, version), reigns=reigns)

    def rolled_back(self, to: int | None = None) -> Registry:
        """The registry with an earlier champion.

        Args:
            to: a version; none: the champion before this one.

        Raises:
            InputError: there is no such version.
        """
        if to is None:
            if len(self.line) < 2:
                raise InputError(
                    "there is no earlier champion to go back to",
                    where=f"champion: {self.champion or 'none'}",
                    fix="name a version: `ddsr versions` lists them",
                )
            to = self.line[-2]
        if self.version(to).number == self.champion:
            return self
        reign = ActivePeriod(version=to, since=now(), why=f"put back in place of version {self.champion}")
        return Registry(versions=self.versions, reigns=(*self.reigns, reign))


def should_promote(metric: Metric, challenger: float, champion: float | None, margin: float) -> tuple[bool, str]:
    """Whether a challenger takes the champion's place, and why.

    Args:
        margin: how much worse it may be, in the metric's unit.

    >>> should_promote("psnr_y", 26.40, 26.45, margin=0.1)
    (True, 'psnr_y 26.4000 is not worse than 26.4500 by more than 0.1')
    >>> should_promote("lpips", 0.46, 0.45, margin=0.0)
    (False, 'lpips 0.4600 is worse than 0.4500 by more than 0.0')
    """
    if champion is None:
        return True, "the first version"
    loss = challenger - champion if metric in LOWER_IS_BETTER else champion - challenger
    verdict = "is worse" if loss > margin else "is not worse"
    return loss <= margin, f"{metric} {challenger:.4f} {verdict} than {champion:.4f} by more than {margin}"


def read_registry(store: Store, name: str) -> Registry:
    """The registry of a name; empty where nothing has been made yet.

    Raises:
        ConfigError: the name cannot be one of a folder.
        InputError: the file is damaged.
    """
    path = f"{folder_of(name)}/{FILE}"
    data = store.read_file(path)
    if data is None:
        return Registry()
    try:
        return Registry.model_validate_json(data)
    except ValueError as error:
        fix = "bring it back from a back-up"
        raise InputError(f"the registry is damaged: {error}", where=f"{store.url}/{path}", fix=fix) from error


@contextmanager
def changing(store: Store, name: str) -> Iterator[Registry]:
    """The registry, which nobody else changes meanwhile. Not to be held for long."""
    with store.locked(f"{folder_of(name)}/registry", what=f"the registry of {name!r}, changed"):
        yield read_registry(store, name)


def write_registry(store: Store, name: str, registry: Registry) -> None:
    """Keep it, for all machines that share the home."""
    store.write_file(f"{folder_of(name)}/{FILE}", _json(registry.model_dump(mode="json")))


def registry_names(store: Store) -> list[str]:
    """The series of a home, those included whose first night is going on."""
    return sorted({path.split("/")[0] for path in store.sizes(FOLDER) if "/" in path})


def write_photos(store: Store, name: str, number: int, photos: Mapping[str, str]) -> None:
    """Keep which photos a version is made from: name -> digest of the content."""
    store.write_file(_photos_file(name, number), _json(dict(photos)))


def read_photos(store: Store, name: str, number: int) -> dict[str, str] | None:
    """What `write_photos` was given; None if it is gone."""
    data = store.read_file(_photos_file(name, number))
    return None if data is None else dict(json.loads(data))


def _photos_file(name: str, number: int) -> str:
    return f"{folder_of(name)}/photos/{number:04d}.json"


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def folder_of(name: str) -> str:
    """``nightly/<name>``, relative to the home.

    Raises:
        ConfigError: the name has signs that a folder, or a key of Prefect's artifacts, should not have.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        fix = "use letters, digits, - and _, and begin with a letter or a digit"
        raise ConfigError(f"{name!r} cannot be a name", where="name", fix=fix)
    return f"{FOLDER}/{name}"


def night_lock(name: str) -> str:
    """The lock of whoever spends a night, relative to the home."""
    return f"{folder_of(name)}/night"
