"""Content-addressed artifacts: written aside, synced, renamed when whole, verified when read.

``<home>/artifacts/<stage>/<key>/`` holds one stage's output and its ``manifest.json``. A build that is cut off leaves
``<key>.partial`` behind, which the next build of the same key continues.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from filelock import FileLock
from pydantic import BaseModel, ConfigDict

from ddsr_core.config import Runtime, StageConfig, digest_of
from ddsr_core.errors import StorageError

MANIFEST = "manifest.json"
#: A stage keeps what it needs to continue (checkpoints, shards in progress) in ``out / RESUME``; gone once it is whole.
RESUME = "resume"


class FileEntry(BaseModel):
    """Size and SHA-256 of one file of an artifact."""

    model_config = ConfigDict(frozen=True)
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What an artifact is, what it was made from, and what must be in it."""

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


@dataclass(frozen=True)
class StageResult:
    """What a stage function returns once its output folder is complete.

    Attributes:
        counts: small JSON facts for the manifest, the UI and the report.
        digest: digest of the content, where equal content does not mean equal bytes (LanceDB); else made from the files.
    """

    counts: Mapping[str, Any] = field(default_factory=dict)
    digest: str | None = None


class StageInput(Protocol):
    """Anything a stage reads: an `Artifact` or an external source. Its digest enters the key, its path the function."""

    @property
    def digest(self) -> str: ...
    @property
    def path(self) -> Path: ...


@dataclass(frozen=True)
class Source:
    """Input from outside the store, named by the digest of its content and found at a path."""

    path: Path
    digest: str


@dataclass(frozen=True)
class Artifact:
    """A whole artifact on this machine's disk."""

    manifest: Manifest
    path: Path

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def key(self) -> str:
        return self.manifest.key


@dataclass(frozen=True)
class Stage:
    """A stage: ``run(config, **inputs as paths, out=Path, runtime=Runtime) -> StageResult``.

    ``version`` goes up whenever the code would write something else for the same config and inputs.
    """

    name: str
    version: int
    run: Callable[..., StageResult]

    def key(self, config: StageConfig, inputs: Mapping[str, StageInput]) -> str:
        """Hash of stage name, stage version, canonical config and the inputs' digests (first 32 hex digits)."""
        parents = {name: item.digest for name, item in inputs.items()}
        return digest_of([self.name, self.version, config.model_dump(mode="json"), parents])[:32]


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turn the operating system's refusals (full disk, no permission) into a `StorageError` with a mend."""
    try:
        yield
    except OSError as error:
        mends = {
            errno.ENOSPC: "free some space (`ddsr gc` removes unfinished artifacts) and run again: finished stages are kept",
            errno.EDQUOT: "raise the quota or choose another folder with --home; finished stages are kept",
            errno.EACCES: "choose a folder that you may write to with --home, or change its permissions",
            errno.EPERM: "choose a folder that you may write to with --home, or change its permissions",
            errno.EROFS: "the file system is read-only: choose another folder with --home",
            errno.EEXIST: "a file stands where a folder is needed: move it or choose another folder with --home",
            errno.ENOTDIR: "a file stands where a folder is needed: move it or choose another folder with --home",
        }
        if error.errno not in mends:
            raise
        place = error.filename or where
        raise StorageError(f"cannot write: {os.strerror(error.errno)}", where=place, mend=mends[error.errno]) from error


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, streamed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, after which ``path`` holds all of it, or, after an error, its old content.

    A temporary sibling is written, synced and renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds either its old content or all of the new."""
    with writing_atomically(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as readable JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


class Store:
    """The artifacts below a home folder."""

    def __init__(self, home: Path) -> None:
        self.home = Path(home).expanduser().absolute()

    def folder(self, stage: str, key: str) -> Path:
        return self.home / "artifacts" / stage / key

    def find(self, stage: str, key: str) -> Artifact | None:
        """The artifact if it is there and every file has the digest of its manifest; None if it is missing or damaged."""
        folder = self.folder(stage, key)
        manifest = read_manifest(folder)
        if manifest is None or not _is_whole(folder, manifest):
            return None
        return Artifact(manifest, folder)

    def build(
        self,
        stage: Stage,
        config: StageConfig,
        inputs: Mapping[str, StageInput],
        runtime: Runtime | None = None,
    ) -> tuple[Artifact, bool]:
        """The stage's artifact and whether it was already there. Builds it, or continues a build that was cut off.

        Two processes that want the same key build it once: the second waits for the first.

        Raises:
            StorageError: the home folder cannot be written.
            DdsrError: whatever the stage itself raises; its partial folder is kept.
        """
        runtime = runtime or Runtime()
        key = stage.key(config, inputs)
        folder = self.folder(stage.name, key)
        with storage_errors(self.home):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(key + ".lock")):
                found = self.find(stage.name, key)
                if found is not None:
                    return found, True
                if folder.exists():  # damaged: out of the way, so that the rebuilt one can take its place
                    shutil.rmtree(folder)
                return self._build_locked(stage, key, config, inputs, runtime), False

    def _build_locked(
        self, stage: Stage, key: str, config: StageConfig, inputs: Mapping[str, StageInput], runtime: Runtime
    ) -> Artifact:
        folder = self.folder(stage.name, key)
        partial = folder.with_name(key + ".partial")
        partial.mkdir(exist_ok=True)
        started = time.monotonic()
        result = stage.run(config, **{name: item.path for name, item in inputs.items()}, out=partial, runtime=runtime)
        shutil.rmtree(partial / RESUME, ignore_errors=True)
        files = _entries(partial)
        manifest = Manifest(
            stage=stage.name,
            key=key,
            digest=result.digest or digest_of({name: entry.sha256 for name, entry in files.items()}),
            stage_version=stage.version,
            config=config.model_dump(mode="json"),
            parents={name: item.digest for name, item in inputs.items()},
            counts=dict(result.counts),
            files=files,
            bytes=sum(entry.bytes for entry in files.values()),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - started, 3),
            device=runtime.device,
        )
        write_json(partial / MANIFEST, manifest.model_dump(mode="json"))
        _sync_tree(partial)
        os.rename(partial, folder)
        _sync_folder(folder.parent)
        return Artifact(manifest, folder)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of an artifact folder, or None where there is none that can be read."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _is_whole(folder: Path, manifest: Manifest) -> bool:
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry.bytes or sha256_of(path) != entry.sha256:
            return False
    return True


def _entries(folder: Path) -> dict[str, FileEntry]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {
        path.relative_to(folder).as_posix(): FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path)) for path in paths
    }


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(root))
