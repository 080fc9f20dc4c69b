"""Content-addressed artifacts: written to a temporary folder, synced, renamed when complete, verified when read.

``<home>/artifacts/<stage>/<key>/`` holds one stage's output and its ``manifest.json``. A build that is interrupted leaves
``<key>.partial`` behind, which the next build of the same key continues.
"""

from __future__ import annotations

import logging
import os
import resource
import shutil
import socket
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict

from ddsr_core.config import Runtime, StageConfig, digest_of
from ddsr_core.errors import ChangedInputError, StorageError
from ddsr_core.storage.files import (
    now,
    remove_temporary_files,
    sha256_of,
    storage_errors,
    sync_folder,
    sync_tree,
    write_atomically,
    write_json,
    writing_atomically,
)
from ddsr_core.storage.home import is_home, mark_home
from ddsr_core.storage.stage import (
    MANIFEST,
    RESUME,
    Artifact,
    FileEntry,
    Manifest,
    Source,
    Stage,
    StageInput,
    StageResult,
    file_entries,
    foreign_files,
    has_content,
    is_whole,
    read_manifest,
)

__all__ = [
    "LOG",
    "MANIFEST",
    "RESUME",
    "Artifact",
    "FileEntry",
    "InputRef",
    "Manifest",
    "Owner",
    "Source",
    "Stage",
    "StageInput",
    "StageResult",
    "Store",
    "held_by_another",
    "is_whole",
    "now",
    "read_manifest",
    "sha256_of",
    "storage_errors",
    "write_atomically",
    "write_json",
    "writing_atomically",
]

LOG = logging.getLogger("ddsr.store")


class Owner(BaseModel):
    """The process that holds a lock, as it describes itself to those that wait."""

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


class Store:
    """The artifacts below a home folder.

    Attributes:
        home: the folder; for a home on S3 (`ddsr_core.storage.remote_store`), its copy on this machine.
        url: address of the home, to open the store with on this or another machine.
    """

    def __init__(self, home: Path) -> None:
        if str(home).startswith("s3:"):
            raise StorageError("this needs a home on this machine", where=home, fix="name a folder as the home")
        self.home = Path(home).expanduser().absolute()
        self.url = str(self.home)
        self._verified = set[tuple[str, str]]()

    def folder(self, stage: str, key: str) -> Path:
        return self.home / "artifacts" / stage / key

    def find(self, stage: str, key: str) -> Artifact | None:
        """The artifact if it is complete and every file has the digest of its manifest; None if it is missing or damaged.

        Foreign files in its folder are moved to ``<home>/set-aside``, as stages would read them.
        """
        folder = self.folder(stage, key)
        manifest = read_manifest(folder)
        if manifest is None or not manifest.belongs_to(stage, key):
            return None
        for name in foreign_files(folder, manifest):
            self._set_aside(folder, name)
        return Artifact(manifest, folder) if is_whole(folder, manifest) else None

    def _set_aside(self, folder: Path, name: str) -> None:
        target = self.home / "set-aside" / folder.parent.name / folder.name / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / name, target)
        except OSError as error:  # then the artifact counts as damaged
            LOG.warning("%s: a foreign file, %s, cannot be moved away: %s", folder, name, error.strerror)
        else:
            LOG.warning("%s: a foreign file, moved to %s", folder / name, target)

    def build(
        self,
        stage: Stage,
        config: StageConfig,
        inputs: Mapping[str, StageInput],
        runtime: Runtime | None = None,
    ) -> tuple[Artifact, bool]:
        """Build the stage's artifact, continue an interrupted build, or return the existing artifact.

        If two processes request the same key, it is built once: the second waits for the first.

        Returns:
            The artifact, and whether it already existed.

        Raises:
            StorageError: the home folder cannot be written.
            DdsrError: whatever the stage itself raises; its partial folder is kept.
        """
        runtime = runtime or Runtime()
        if not stage.photo_cache:
            runtime = replace(runtime, photo_cache=None)
        key = stage.key(config, inputs)
        with storage_errors(self.home):
            self.mark()
            self.folder(stage.name, key).parent.mkdir(parents=True, exist_ok=True)
            with self.locked(f"artifacts/{stage.name}/{key}", runtime.run, f"{stage.name} {key}, built"):
                existing = self.find(stage.name, key)
                if existing is not None:
                    return existing, True
                return self._build_locked(stage, key, config, inputs, runtime), False

    @contextmanager
    def locked(self, name: str, run: str = "", what: str | None = None, wait: bool = True) -> Iterator[None]:
        """Hold the lock ``<name>.lock`` of the home; wait while another process holds it, and log which one.

        The operating system releases the lock when this process ends, however it ends.

        Args:
            name: a path relative to the home.
            run: name of the run, shown to processes that wait.
            what: what is done under the lock, shown to processes that wait.
            wait: False raises an error instead of waiting.

        Raises:
            StorageError: another process holds the lock and ``wait`` is False, or the home cannot be written.
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
            with suppress(OSError):  # the note only tells other processes what they wait for
                note.write_text(Owner.here(run).model_dump_json())
            yield
        finally:
            with suppress(OSError):
                note.unlink(missing_ok=True)
            lock.release()

    def _build_locked(
        self, stage: Stage, key: str, config: StageConfig, inputs: Mapping[str, StageInput], runtime: Runtime
    ) -> Artifact:
        folder = self.folder(stage.name, key)
        _remove(folder)  # damaged, or `find` would have returned it
        partial = folder.with_name(key + ".partial")
        partial.mkdir(exist_ok=True)
        started, cpu_before = time.monotonic(), cpu_seconds()
        outside = {name: item.digest for name, item in inputs.items() if not item.stored}
        runtime = replace(runtime, input_digests=outside)
        try:
            result = stage.run(config, **{name: item.path for name, item in inputs.items()}, out=partial, runtime=runtime)
            for name, digest in result.inputs.items():
                runtime.require_unchanged(name, digest, inputs[name].path)
        except ChangedInputError:
            shutil.rmtree(partial)
            raise
        shutil.rmtree(partial / RESUME, ignore_errors=True)
        remove_temporary_files(partial)
        files = file_entries(partial)
        if not files:
            raise StorageError(f"the stage {stage.name} has written nothing", where=partial, fix="report this as a bug")
        manifest = Manifest(
            stage=stage.name,
            key=key,
            digest=result.digest or digest_of({name: entry.sha256 for name, entry in files.items()}),
            stage_version=stage.version,
            config=config.canonical(),
            parents={name: item.digest for name, item in inputs.items()},
            counts=dict(result.counts),
            files=files,
            bytes=sum(entry.bytes for entry in files.values()),
            created=now("microseconds"),  # what a run has built is newer than its beginning, even by less than a second
            seconds=round(time.monotonic() - started, 3),
            device=runtime.device,
            cpu_seconds=round(cpu_seconds() - cpu_before, 3),
            peak_bytes=peak_bytes(),
        ).checked()
        write_json(partial / MANIFEST, manifest.model_dump(mode="json"))
        sync_tree(partial)
        os.rename(partial, folder)
        sync_folder(folder.parent)
        return Artifact(manifest, folder)

    def forget(self, artifact: Artifact) -> None:
        """Remove an artifact whose content does not belong to its key."""
        shutil.rmtree(self.folder(artifact.manifest.stage, artifact.key))

    def check(self) -> None:
        """Write a file and remove it, so that a home that cannot be written is reported before any work.

        Raises:
            StorageError: the home cannot be written.
        """
        with storage_errors(self.home):
            self.mark()
            write_atomically(self.home / ".writable", b"")
            (self.home / ".writable").unlink()

    def mark(self) -> None:
        """Mark the home as one of ddsr, if it is not marked yet."""
        mark_home(self.home)

    def is_marked(self) -> bool:
        """Whether it is a home of ddsr; nothing is removed from other folders."""
        return is_home(self.home)

    def bring(self, path: Path) -> Path:
        """The local folder of an artifact, given its path in a ``run.json``.

        Another machine may have written the path, or the home may have been moved or copied since.

        Raises:
            StorageError: the artifact is missing or damaged.
        """
        stage, key = path.parts[-2:]
        if (stage, key) not in self._verified:
            if self.find(stage, key) is None:
                where = f"{self.url}/artifacts/{stage}/{key}"
                raise StorageError("the artifact is missing or damaged", where=where, fix="run again: it is rebuilt")
            self._verified.add((stage, key))
        return self.folder(stage, key)

    def read_file(self, name: str) -> bytes | None:
        """A small file that all machines share, such as ``nightly/cats/registry.json``; None if there is none."""
        path = self.home / name
        return path.read_bytes() if path.is_file() else None

    def write_file(self, name: str, data: bytes) -> None:
        """Write a small file that all machines share, atomically.

        Raises:
            StorageError: the home cannot be written.
        """
        with storage_errors(self.home / name):
            write_atomically(self.home / name, data)

    def remove_file(self, name: str) -> None:
        """Remove a small file that all machines share, if it exists."""
        (self.home / name).unlink(missing_ok=True)

    def sizes(self, folder: str) -> dict[str, int]:
        """Sizes in bytes of the published files below a folder of the home, by path relative to that folder."""
        root = self.home / folder
        return {path.relative_to(root).as_posix(): path.stat().st_size for path in root.rglob("*") if path.is_file()}

    def holds(self, folder: str, files: Mapping[str, FileEntry]) -> bool:
        """Whether a folder of the home holds exactly these files, with their digests; on S3, with their sizes."""
        root = self.home / folder
        same_names = self.sizes(folder).keys() == files.keys()
        return same_names and all(has_content(root / name, entry) for name, entry in files.items())

    def push(self, folder: str, *, mirror: bool = False) -> None:
        """Publish a folder of the home, such as ``runs/demo``. Does nothing for a local home.

        Args:
            mirror: also remove published files that are not in the local folder.
        """

    def pull(self, folder: str, names: Collection[str]) -> None:
        """Download the files with these names below a folder of the home. Does nothing for a local home."""


class InputRef(BaseModel):
    """A stage input as plain data, for other processes and machines: its path and the digest of its content.

    An artifact also carries its stage and key, so that another machine can download it from the home that they share.
    """

    path: Path
    digest: str
    stage: str | None = None
    key: str | None = None

    @classmethod
    def of(cls, item: StageInput) -> InputRef:
        """The reference of an artifact or of an external source."""
        named = {"stage": item.manifest.stage, "key": item.key} if isinstance(item, Artifact) else {}
        return cls(path=item.path, digest=item.digest, **named)

    @property
    def stored(self) -> bool:
        """Whether it is an artifact of the store."""
        return bool(self.stage and self.key)

    def source(self, store: Store) -> Source:
        """The input on this machine.

        Raises:
            StorageError: an artifact that is neither on this machine nor in the home.
        """
        if self.stage and self.key:
            local = store.folder(self.stage, self.key)
            # The path differs from the local one if another machine, or another cache folder, has written it.
            is_local = self.path == local and local.exists()
            return Source(local if is_local else store.bring(local), self.digest, stored=True)
        return Source(self.path, self.digest)


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak_bytes() -> int:
    """Most memory that this process has used so far, in bytes (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def held_by_another(what: str, owner: object) -> StorageError:
    """The error for a caller that does not want to wait for a lock."""
    return StorageError(f"{what} by {owner}", fix="wait until that is done, and run again")


def _remove(path: Path) -> None:
    """Remove a folder with its contents, a file, or a link (but not its target)."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _owner(note: Path) -> str:
    try:
        return str(Owner.model_validate_json(note.read_bytes()))
    except (FileNotFoundError, ValueError):  # it has just taken or just released the lock
        return "another process"
