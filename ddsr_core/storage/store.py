"""Content-addressed artifacts: written aside, synced, renamed when whole, verified when read.

``<home>/artifacts/<stage>/<key>/`` holds one stage's output and its ``manifest.json``. A build that is cut off leaves
``<key>.partial`` behind, which the next build of the same key continues.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict

from ddsr_core.config import Runtime, StageConfig, digest_of
from ddsr_core.errors import StorageError

MANIFEST = "manifest.json"
LOG = logging.getLogger("ddsr.store")
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

    Attributes:
        name: of the stage, its module, its config's field and its folder below ``artifacts/``.
        version: goes up whenever the code would write something else for the same config and inputs.
        run: builds the artifact.
        config: class of its config.
        section: of the paper, where the stage stands in it.
        on_gpu: whether it runs on the GPU pool, where there is one.
        photo_cache: whether it can reuse what is known of single photos (`Runtime.photo_cache`).
    """

    name: str
    version: int
    run: Callable[..., StageResult]
    config: type[StageConfig]
    section: str = ""
    on_gpu: bool = False
    photo_cache: bool = False

    def key(self, config: StageConfig, inputs: Mapping[str, StageInput]) -> str:
        """Hash of stage name, stage version, canonical config and the inputs' digests (first 32 hex digits)."""
        parents = {name: item.digest for name, item in inputs.items()}
        return digest_of([self.name, self.version, config.model_dump(mode="json"), parents])[:32]


class Owner(BaseModel):
    """Who builds an artifact now: what a process writes beside the lock that it holds, for those who wait."""

    model_config = ConfigDict(frozen=True)
    pid: int
    host: str
    run: str
    since: str

    @classmethod
    def here(cls, run: str) -> Self:
        """This process."""
        return cls(pid=os.getpid(), host=socket.gethostname(), run=run, since=now())

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (run {self.run})" if self.run else "") + f" since {self.since}"


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turn the operating system's refusals (full disk, no permission) into a `StorageError` that says how to fix it."""
    try:
        yield
    except OSError as error:
        fixes = {
            errno.ENOSPC: "free some space (`ddsr gc --delete`) and run again: finished stages are kept",
            errno.EDQUOT: "raise the quota or choose another folder with --home; finished stages are kept",
            errno.EACCES: "choose a folder that you may write to with --home, or change its permissions",
            errno.EPERM: "choose a folder that you may write to with --home, or change its permissions",
            errno.EROFS: "the file system is read-only: choose another folder with --home",
            errno.EEXIST: "a file stands where a folder is needed: move it or choose another folder with --home",
            errno.ENOTDIR: "a file stands where a folder is needed: move it or choose another folder with --home",
        }
        if error.errno not in fixes:
            raise
        place = error.filename or where
        raise StorageError(f"cannot write: {os.strerror(error.errno)}", where=place, fix=fixes[error.errno]) from error


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
    """The artifacts below a home folder.

    Attributes:
        home: the folder; for a home on S3 (`ddsr_core.storage.remote_store`), its copy on this machine.
        url: what to open the store by, here or on another machine.
    """

    def __init__(self, home: Path) -> None:
        if str(home).startswith("s3:"):
            raise StorageError("this needs a home on this machine", where=home, fix="name a folder as the home")
        self.home = Path(home).expanduser().absolute()
        self.url = str(self.home)

    def folder(self, stage: str, key: str) -> Path:
        return self.home / "artifacts" / stage / key

    def find(self, stage: str, key: str) -> Artifact | None:
        """The artifact if it is there and every file has the digest of its manifest; None if it is missing or damaged."""
        folder = self.folder(stage, key)
        manifest = read_manifest(folder)
        if manifest is None or not is_whole(folder, manifest):
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
        with storage_errors(self.home):
            self.folder(stage.name, key).parent.mkdir(parents=True, exist_ok=True)
            with self.locked(f"artifacts/{stage.name}/{key}", runtime.run, f"{stage.name} {key}, built"):
                found = self.find(stage.name, key)
                if found is not None:
                    return found, True
                return self._build_locked(stage, key, config, inputs, runtime), False

    @contextmanager
    def locked(self, name: str, run: str = "", what: str | None = None, wait: bool = True) -> Iterator[None]:
        """Hold the lock ``<name>.lock`` of the home; where another holds it, wait, and say for whom.

        The system lets go of it when this process ends, however it ends.

        Args:
            name: a path relative to the home.
            run: name of the run, for those who wait.
            what: for the message of those who wait: what is done under the lock.

        Raises:
            StorageError: another holds it and ``wait`` is False, or the home cannot be written.
        """
        path = self.home / f"{name}.lock"
        note, lock = path.with_suffix(".owner"), FileLock(path)
        with storage_errors(self.home):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                if not wait:
                    raise held_by_another(what or name, _owner(note)) from error
                LOG.warning("waiting for %s by %s", what or name, _owner(note))
                lock.acquire()
        try:
            note.write_text(Owner.here(run).model_dump_json())
            yield
        finally:
            note.unlink(missing_ok=True)
            lock.release()

    def _build_locked(
        self, stage: Stage, key: str, config: StageConfig, inputs: Mapping[str, StageInput], runtime: Runtime
    ) -> Artifact:
        folder = self.folder(stage.name, key)
        if folder.exists():  # damaged: out of the way, so that the rebuilt one can take its place
            shutil.rmtree(folder)
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
            created=now(),
            seconds=round(time.monotonic() - started, 3),
            device=runtime.device,
        )
        write_json(partial / MANIFEST, manifest.model_dump(mode="json"))
        _sync_tree(partial)
        os.rename(partial, folder)
        _sync_folder(folder.parent)
        return Artifact(manifest, folder)

    def forget(self, artifact: Artifact) -> None:
        """Remove an artifact that is not what its key says."""
        shutil.rmtree(self.folder(artifact.manifest.stage, artifact.key))

    def check(self) -> None:
        """Write something and remove it: a home that cannot be written is found before any work.

        Raises:
            StorageError: it cannot be written.
        """
        with storage_errors(self.home):
            write_atomically(self.home / ".writable", b"")
            (self.home / ".writable").unlink()

    def bring(self, path: Path) -> Path:
        """The folder of an artifact of this home by the path in a ``run.json``, which another machine may have written."""
        return path

    def read_file(self, name: str) -> bytes | None:
        """A small file that all machines share, such as ``nightly/cats/registry.json``; None if there is none."""
        path = self.home / name
        return path.read_bytes() if path.is_file() else None

    def write_file(self, name: str, data: bytes) -> None:
        """Write a small file that all machines share, whole or not at all.

        Raises:
            StorageError: the home cannot be written.
        """
        with storage_errors(self.home / name):
            write_atomically(self.home / name, data)

    def remove_file(self, name: str) -> None:
        """Remove a small file that all machines share, if it is there."""
        (self.home / name).unlink(missing_ok=True)

    def sizes(self, folder: str) -> dict[str, int]:
        """Files below a folder of the home as it is published, relative to the folder, with their sizes in bytes."""
        root = self.home / folder
        return {path.relative_to(root).as_posix(): path.stat().st_size for path in root.rglob("*") if path.is_file()}

    def push(self, folder: str, *, mirror: bool = False) -> None:
        """Publish a folder of the home, such as ``runs/demo``: on a local home, nothing is to be done.

        Args:
            mirror: also remove what is published and not here.
        """

    def pull(self, folder: str, names: Collection[str]) -> None:
        """Bring the files with these names below a folder of the home: on a local home, they are there."""


class InputRef(BaseModel):
    """A stage input as plain data, for other processes and machines: where it lies and the digest of its content.

    An artifact is also named by stage and key, by which another machine brings it from the home that they share.
    """

    path: Path
    digest: str
    stage: str | None = None
    key: str | None = None

    @classmethod
    def of(cls, item: StageInput) -> InputRef:
        """The reference of an artifact or of an outer source."""
        named = {"stage": item.manifest.stage, "key": item.key} if isinstance(item, Artifact) else {}
        return cls(path=item.path, digest=item.digest, **named)

    def source(self, store: Store) -> Source:
        """The input on this machine.

        Raises:
            StorageError: an artifact that is neither here nor in the home.
        """
        if self.stage and self.key:
            here = store.folder(self.stage, self.key)
            there = self.path == here and here.exists()  # else it is named as another machine, or another cache, has it
            return Source(here if there else store.bring(here), self.digest)
        return Source(self.path, self.digest)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of an artifact folder, or None where there is none that can be read."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def is_whole(folder: Path, manifest: Manifest) -> bool:
    """Whether every file of the manifest is there with its size and digest."""
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry.bytes or sha256_of(path) != entry.sha256:
            return False
    return True


def held_by_another(what: str, owner: object) -> StorageError:
    """What is raised where nobody wants to wait for a lock."""
    return StorageError(f"{what} by {owner}", fix="wait until that is done, and run again")


def _owner(note: Path) -> str:
    try:
        return str(Owner.model_validate_json(note.read_bytes()))
    except (FileNotFoundError, ValueError):  # it has just taken the lock, or has just let go of it
        return "another process"


def now(precision: str = "seconds") -> str:
    """UTC as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec=precision)


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
