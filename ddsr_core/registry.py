"""Distilled sets in succession: which one is in use (the champion), what came before it, and why each was taken or not.

``<home>/nightly/<name>/registry.json`` is the history, ``current/`` beside it the champion's set, to be trained on.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from ddsr_core.errors import ConfigError, InputError
from ddsr_core.store import Store, storage_errors, write_json

Metric = Literal["psnr_y", "psnr_rgb", "ssim_y", "ssim_rgb", "lpips"]
#: Of these, less is better.
LOWER_IS_BETTER = frozenset({"lpips"})


class Version(BaseModel):
    """One distilled set that was made and measured.

    Attributes:
        run: its run below ``runs/``, with the report.
        made: UTC, ISO 8601.
        photos, test, config: digests of what it was made from, measured on, and of the settings.
        changes: photos and patches that were new, kept and dropped.
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
    keys: dict[str, str]
    warm_from: int | None
    metric: Metric
    score: float
    against: float | None
    promoted: bool
    reason: str


class Registry(BaseModel):
    """All versions, oldest first, and the number of the one in use."""

    model_config = ConfigDict(frozen=True)
    champion: int | None = None
    versions: tuple[Version, ...] = ()

    def version(self, number: int) -> Version:
        """
        Raises:
            InputError: there is none of that number.
        """
        found = next((item for item in self.versions if item.number == number), None)
        if found is None:
            known = ", ".join(str(item.number) for item in self.versions) or "none yet"
            raise InputError(f"there is no version {number}", mend=f"versions here: {known}")
        return found

    @property
    def current(self) -> Version | None:
        """The champion."""
        return None if self.champion is None else self.version(self.champion)

    def with_version(self, version: Version) -> Registry:
        """The registry with a new version, which is the champion if it was promoted."""
        champion = version.number if version.promoted else self.champion
        return Registry(champion=champion, versions=(*self.versions, version))

    def rolled_back(self, to: int | None = None) -> Registry:
        """The registry with an earlier champion.

        Args:
            to: a version; none: the last one before the champion that was promoted.

        Raises:
            InputError: there is no such version.
        """
        if to is None:
            earlier = [
                v.number for v in self.versions if v.promoted and self.champion is not None and v.number < self.champion
            ]
            if not earlier:
                raise InputError(
                    "there is no earlier champion to go back to",
                    where=f"champion: {self.champion or 'none'}",
                    mend="name a version: `ddsr versions` lists them",
                )
            to = earlier[-1]
        return Registry(champion=self.version(to).number, versions=self.versions)


def judge(metric: Metric, challenger: float, champion: float | None, margin: float) -> tuple[bool, str]:
    """Whether a challenger takes the champion's place, and why.

    Args:
        margin: how much worse it may be, in the metric's unit.

    >>> judge("psnr_y", 26.40, 26.45, margin=0.1)
    (True, 'psnr_y 26.4000 is not worse than 26.4500 by more than 0.1')
    >>> judge("lpips", 0.46, 0.45, margin=0.0)
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
    store.pull(f"{folder_of(name)}", ["registry.json"])
    path = store.home / folder_of(name) / "registry.json"
    if not path.is_file():
        return Registry()
    try:
        return Registry.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise InputError(f"the registry is damaged: {error}", where=path, mend="bring it back from a back-up") from error


def write_registry(store: Store, name: str, registry: Registry) -> None:
    """Keep it, for all machines that share the home."""
    path = store.home / folder_of(name) / "registry.json"
    with storage_errors(path):
        write_json(path, registry.model_dump(mode="json"))
    store.push(folder_of(name))


def folder_of(name: str) -> str:
    """``nightly/<name>``, relative to the home.

    Raises:
        ConfigError: the name has signs that a folder should not have.
    """
    if not name or not all(sign.isalnum() or sign in "-_" for sign in name):
        raise ConfigError(f"{name!r} cannot be a name", where="name", mend="use letters, digits, - and _")
    return f"nightly/{name}"
