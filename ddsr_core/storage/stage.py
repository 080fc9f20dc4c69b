"""What a stage is, what it reads, and the artifact that it writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from ddsr_core.config import StageConfig, digest_of
from ddsr_core.errors import StorageError
from ddsr_core.storage.files import sha256_of

MANIFEST = "manifest.json"
#: Hex digits of a key.
KEY_LENGTH = 32
_KEY = re.compile(f"[0-9a-f]{{{KEY_LENGTH}}}")
#: A stage stores in ``out / RESUME`` what it needs to resume after an interruption, such as checkpoints. The folder is
#: removed when the artifact is complete.
RESUME = "resume"


class FileEntry(BaseModel):
    """Size and SHA-256 of one file of an artifact."""

    model_config = ConfigDict(frozen=True)
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What an artifact is, what it was made from, and which files it must contain."""

    model_config = ConfigDict(frozen=True)
    stage: str
    key: str
    digest: str
    stage_version: int
    config: dict[str, Any]
    parents: dict[str, str]
    counts: dict[str, Any]
    files: dict[str, FileEntry]
    bytes: int
    created: str
    seconds: float
    device: str
    #: Seconds of CPU that the build took, its child processes included.
    cpu_seconds: float | None = None
    #: Largest memory that the building process has used until the end of the build.
    peak_bytes: int | None = None
    #: Digest of all other fields; artifacts of earlier versions have none.
    check: str | None = None

    def checked(self) -> Manifest:
        """The manifest with its own digest."""
        return self.model_copy(update={"check": self._own_digest()})

    def belongs_to(self, stage: str, key: str) -> bool:
        """Whether the manifest is undamaged and that of this artifact: the key is the hash of what it was made from."""
        made_of = [self.stage, self.stage_version, self.config, self.parents]
        return (
            (self.stage, self.key) == (stage, key)
            and bool(self.files)
            and self.bytes == sum(entry.bytes for entry in self.files.values())
            and self.check in (None, self._own_digest())
            and digest_of(made_of)[:KEY_LENGTH] == key
        )

    def _own_digest(self) -> str:
        cost = {name for name in ("cpu_seconds", "peak_bytes") if getattr(self, name) is None}  # of earlier versions
        return digest_of(self.model_dump(mode="json", exclude={"check", *cost}))


@dataclass(frozen=True)
class StageResult:
    """What a stage function returns when its output folder is complete.

    Attributes:
        counts: small JSON values for the manifest, the UI and the report.
        inputs: digests of inputs as the stage has read them, if it has computed them. The build is discarded if one of
            them is not the digest in the key.
        digest: digest of the content, for output whose bytes vary although its content does not (LanceDB). None: made
            from the digests of the files.
    """

    counts: Mapping[str, Any] = field(default_factory=dict)
    digest: str | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)


class StageInput(Protocol):
    """Anything a stage reads: an `Artifact` or an external `Source`.

    Its digest enters the key, its path is passed to the stage function. ``stored``: whether it is an artifact of the store,
    which nobody changes.
    """

    @property
    def digest(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def stored(self) -> bool: ...


@dataclass(frozen=True)
class Source:
    """Input from outside the store, or an artifact in another process (``stored``): a path, and its content's digest."""

    path: Path
    digest: str
    stored: bool = False


@dataclass(frozen=True)
class Artifact:
    """A complete artifact on this machine's disk."""

    manifest: Manifest
    path: Path

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def key(self) -> str:
        return self.manifest.key

    @property
    def stored(self) -> bool:
        return True


@dataclass(frozen=True)
class Stage:
    """A stage: ``run(config, **inputs as paths, out=Path, runtime=Runtime) -> StageResult``.

    Attributes:
        name: of the stage, its module, its config's field and its folder below ``artifacts/``.
        version: raise it whenever the code writes a different output for the same config and inputs.
        run: builds the artifact.
        config: class of its config.
        section: of the paper, if it describes the stage.
        on_gpu: whether it runs on the GPU pool, if there is one.
        photo_cache: whether it can reuse results of single photos from earlier builds (`Runtime.photo_cache`).
        words: what an artifact is, for people: a format of its counts and its config.
    """

    name: str
    version: int
    run: Callable[..., StageResult]
    config: type[StageConfig]
    section: str = ""
    on_gpu: bool = False
    photo_cache: bool = False
    words: str = ""

    def key(self, config: StageConfig, inputs: Mapping[str, StageInput]) -> str:
        """Hash of stage name, stage version, canonical config and the inputs' digests (first 32 hex digits)."""
        parents = {name: item.digest for name, item in inputs.items()}
        return digest_of([self.name, self.version, config.canonical(), parents])[:KEY_LENGTH]


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of an artifact folder; None if it is missing or cannot be read."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return None


def is_whole(folder: Path, manifest: Manifest) -> bool:
    """Whether the folder holds every file of the manifest, with its size and digest, and no other."""
    contents = all(has_content(folder / name, entry) for name, entry in manifest.files.items())
    return contents and bool(manifest.files) and not foreign_files(folder, manifest)


def foreign_files(folder: Path, manifest: Manifest) -> list[str]:
    """Files of the folder that its manifest does not name, such as copies that a synchronization program has made."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(name for name in names if name != MANIFEST and name not in manifest.files)


def open_artifact(folder: Path) -> Artifact:
    """An artifact by its folder, for readers beside the pipeline. Its files are checked against the manifest.

    Raises:
        StorageError: the artifact is missing, damaged, or contains a foreign file.
    """
    folder = Path(folder).absolute()
    manifest = read_manifest(folder)
    if manifest is None or not manifest.belongs_to(folder.parent.name, folder.name):
        raise StorageError("the artifact is missing or damaged", where=folder, fix="run again: it is rebuilt")
    foreign = foreign_files(folder, manifest)
    if foreign:
        raise StorageError(f"the artifact contains a foreign file: {foreign[0]}", where=folder, fix="move the file away")
    if not is_whole(folder, manifest):
        raise StorageError("a file of the artifact is missing or damaged", where=folder, fix="run again: it is rebuilt")
    return Artifact(manifest, folder)


def is_key(name: str) -> bool:
    """Whether the name of a folder is a key."""
    return _KEY.fullmatch(name) is not None


def require_whole(path: Path | str) -> None:
    """Check the artifact that a user names by its path, or by that of a file in it. Other paths are not looked at.

    Raises:
        StorageError: the artifact is damaged, or contains a foreign file.
    """
    place = Path(path).expanduser().resolve()
    for folder in (place, *place.parents):
        if is_key(folder.name) and folder.parent.parent.name == "artifacts" and folder.is_dir():
            open_artifact(folder)


def has_content(path: Path, entry: FileEntry) -> bool:
    """Whether a file exists with the size and digest of its entry."""
    return path.is_file() and path.stat().st_size == entry.bytes and sha256_of(path) == entry.sha256


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Every file below a folder but its manifest, by path relative to the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {
        path.relative_to(folder).as_posix(): FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path)) for path in paths
    }
