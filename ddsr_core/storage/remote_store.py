"""A home on S3: artifacts are built in a cache folder on this machine, published whole, and brought from there by others.

``<url>/artifacts/<stage>/<key>/manifest.json`` is written last, and only where there is none: its presence says that the
artifact is whole. Its files lie beside it below a folder named by their content, so that two builders which publish at
once never mix. Unfinished builds stay in the cache folder of the machine that began them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, TypeVar

from filelock import FileLock
from pydantic import BeforeValidator

from ddsr_core.config import Runtime, StageConfig, digest_of
from ddsr_core.errors import ConfigError, StorageError, UnreachableError
from ddsr_core.storage.remote_lock import RemoteOwner, remote_lock
from ddsr_core.storage.s3 import SCHEME, Bucket
from ddsr_core.storage.store import (
    LOG,
    MANIFEST,
    Artifact,
    FileEntry,
    Manifest,
    Owner,
    Stage,
    StageInput,
    Store,
    is_whole,
    sha256_of,
    storage_errors,
    write_atomically,
    write_json,
)

#: A home as a parameter of a flow: a folder or ``s3://bucket/prefix``. Text, as a Path would swallow a slash of the URL.
Home = Annotated[str, BeforeValidator(str)]
#: Clocks of this machine and of S3 differ by less than 15 minutes, or S3 would refuse every request.
ABANDONED = timedelta(hours=1)
#: Pauses before what S3 did not answer is asked again.
SILENCE_SECONDS = (5.0, 30.0)
T = TypeVar("T")


def open_store(home: str | Path) -> Store:
    """The store of a home.

    Args:
        home: a folder, or ``s3://bucket/prefix``.

    Raises:
        ConfigError: an URL that is not on S3, or without a bucket.
        StorageError: s3fs is not installed.
    """
    text = str(home)
    if text.startswith(SCHEME):
        return RemoteStore(text)
    if "://" in text:
        raise ConfigError("a home is a folder or an URL on S3", where=text, fix="name a folder or s3://bucket/prefix")
    return Store(Path(home))


def cache_folder(url: str) -> Path:
    """Where this machine keeps its copy of a home on S3: below $DDSR_CACHE, else ~/.cache/ddsr."""
    root = Path(os.environ.get("DDSR_CACHE") or "~/.cache/ddsr").expanduser().absolute()
    return root / hashlib.sha256(url.encode()).hexdigest()[:16]


class RemoteStore(Store):
    """The artifacts below an URL on S3, with a copy of those that were built or asked for here.

    Args:
        url: ``s3://bucket/prefix``.
    """

    def __init__(self, url: str) -> None:
        self.bucket = Bucket(url)
        super().__init__(cache_folder(self.bucket.url))
        self.url = self.bucket.url

    def find(self, stage: str, key: str) -> Artifact | None:
        """The artifact if it is published and whole, brought into the cache folder; None if it is missing or damaged.

        Raises:
            StorageError: S3 refuses or cannot be reached, or the cache folder cannot be written.
        """
        manifest = self._published(stage, key)
        return None if manifest is None else self._fetch(manifest)

    def build(
        self, stage: Stage, config: StageConfig, inputs: Mapping[str, StageInput], runtime: Runtime | None = None
    ) -> tuple[Artifact, bool]:
        """As `Store.build`, for all machines together; what is there is found without a lock.

        Raises:
            StorageError: also where S3 refuses or cannot be reached.
        """
        found = self.find(stage.name, stage.key(config, inputs))
        return (found, True) if found is not None else super().build(stage, config, inputs, runtime)

    @contextmanager
    def locked(self, name: str, run: str = "", what: str | None = None, wait: bool = True) -> Iterator[None]:
        """As `Store.locked`, for all machines together."""
        with super().locked(name, run, what, wait):
            owner = RemoteOwner(**Owner.here(run).model_dump(), cache=self._cache_id())
            with remote_lock(self.bucket, f"{name}.lock", owner, what or name, wait):
                yield

    def _build_locked(
        self, stage: Stage, key: str, config: StageConfig, inputs: Mapping[str, StageInput], runtime: Runtime
    ) -> Artifact:
        if self.bucket.read(_manifest_name(stage.name, key)) is not None:  # damaged, or it would have been found
            self.unpublish(stage.name, key)
        built = super().find(stage.name, key)  # a build that was cut off while it was published
        if built is None:
            with self._shared(runtime.photo_cache):
                built = super()._build_locked(stage, key, config, inputs, runtime)
        return self._publish(built)

    @contextmanager
    def _shared(self, folder: Path | None) -> Iterator[None]:
        """Bring a photo_cache before it is used, and publish it afterwards.

        On S3 it is an index, relative path -> SHA-256, and one object a content below ``files/``: the index is written
        last, so that whoever reads it finds what it names.
        """
        if folder is None:
            yield
            return
        name = folder.relative_to(self.home).as_posix()
        before = self._bring_memo(name, folder)
        yield
        index = {path.relative_to(folder).as_posix(): sha256_of(path) for path in folder.rglob("*") if path.is_file()}
        fresh = {digest: folder / path for path, digest in index.items() if digest not in set(before.values())}
        self.bucket.upload({f"{name}/files/{digest}": path for digest, path in fresh.items()})
        self.bucket.write(f"{name}/index.json", json.dumps(index).encode())
        gone = set(before.values()) - set(index.values())
        self.bucket.remove([f"{name}/files/{digest}" for digest in gone])

    def _bring_memo(self, name: str, folder: Path) -> dict[str, str]:
        """Make the folder what is published; its index. A photo_cache that has lost something on S3 is as good as none."""
        there = self.bucket.read(f"{name}/index.json")
        index: dict[str, str] = {} if there is None else json.loads(there[0])
        with storage_errors(self.home):
            for file in [file for file in folder.rglob("*") if file.is_file()]:
                if file.relative_to(folder).as_posix() not in index:
                    file.unlink()
            lacking = {p: d for p, d in index.items() if not (folder / p).is_file() or sha256_of(folder / p) != d}
            first = {digest: folder / path for path, digest in lacking.items()}
            if not self.bucket.download({f"{name}/files/{digest}": path for digest, path in first.items()}):
                LOG.warning("%s: incomplete in %s; it begins anew", name, self.url)
                shutil.rmtree(folder)
                return {}
            for path, digest in lacking.items():
                if folder / path != first[digest]:
                    write_atomically(folder / path, first[digest].read_bytes())
        return index

    def _published(self, stage: str, key: str) -> Manifest | None:
        there = self.bucket.read(_manifest_name(stage, key))
        try:
            return None if there is None else Manifest.model_validate_json(there[0])
        except ValueError:
            LOG.warning("%s: its manifest cannot be read; it will be built again", _base(stage, key))
            return None

    def _fetch(self, manifest: Manifest) -> Artifact | None:
        """The copy in the cache folder, brought there first where it is missing or another one; None if S3's is damaged."""
        stage, key = manifest.stage, manifest.key
        folder = self.folder(stage, key)
        with storage_errors(self.home):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(key + ".fetch.lock")):
                here = super().find(stage, key)
                if here is not None and here.manifest.files == manifest.files:
                    return Artifact(manifest, folder)
                fresh = folder.with_name(key + ".fetch")
                if not self._download(manifest, fresh):
                    LOG.warning("%s: damaged in %s; it will be built again", _base(stage, key), self.url)
                    shutil.rmtree(fresh, ignore_errors=True)
                    return None
                write_json(fresh / MANIFEST, manifest.model_dump(mode="json"))
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(fresh, folder)
                return Artifact(manifest, folder)

    def _download(self, manifest: Manifest, fresh: Path) -> bool:
        """Bring the files that a cut-off download has not brought yet. Whether all have the manifest's digests now."""
        place = _files_name(manifest)
        lacking = {f"{place}/{n}": fresh / n for n, entry in manifest.files.items() if not _has(fresh / n, entry)}
        fresh.mkdir(exist_ok=True)
        return self.bucket.download(lacking) and is_whole(fresh, manifest)

    def _publish(self, built: Artifact) -> Artifact:
        """Upload the files, then the manifest. Where another has published meanwhile, its artifact counts."""
        manifest, place = built.manifest, _files_name(built.manifest)
        files = {f"{place}/{name}": built.path / name for name in manifest.files}
        self.bucket.upload(files)
        text = (built.path / MANIFEST).read_bytes()
        if self.bucket.create(_manifest_name(manifest.stage, manifest.key), text) is not None:
            return built
        first = self._published(manifest.stage, manifest.key)
        if first is None or first.files != manifest.files:
            self.bucket.remove(files)
        found = None if first is None else self._fetch(first)
        if found is None:
            base = f"{self.url}/{_base(manifest.stage, manifest.key)}"
            raise StorageError("another builder has published it, but damaged", where=base, fix="run again")
        return found

    def unpublish(self, stage: str, key: str) -> None:
        """Remove an artifact from S3; a copy on this machine stays."""
        self.bucket.remove([_manifest_name(stage, key)])  # first: from here on nobody finds it
        self.bucket.remove(self.bucket.list(_base(stage, key) + "/"))

    def _cache_id(self) -> str:
        """A name for this cache folder that no other machine's has, whatever it is called."""
        path = self.home / "cache-id"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                write_atomically(path, uuid.uuid4().hex.encode())
        return path.read_text()

    def forget(self, artifact: Artifact) -> None:
        self.unpublish(artifact.manifest.stage, artifact.key)
        super().forget(artifact)

    def check(self) -> None:
        super().check()
        self.bucket.write(".writable", b"")
        self.bucket.remove([".writable"])

    def bring(self, path: Path) -> Path:
        """As `Store.bring`.

        Raises:
            StorageError: the artifact is not in this home any more.
        """
        stage, key = path.parts[-2:]
        found = self.find(stage, key)
        if found is None:
            where = f"{self.url}/{_base(stage, key)}"
            raise StorageError("the artifact is missing or damaged", where=where, fix="run again: it is rebuilt")
        return found.path

    def read_file(self, name: str) -> bytes | None:
        there = self.bucket.read(name)
        return None if there is None else there[0]

    def write_file(self, name: str, data: bytes) -> None:
        self.bucket.write(name, data)

    def remove_file(self, name: str) -> None:
        self.bucket.remove([name])

    def sizes(self, folder: str) -> dict[str, int]:
        return {name.removeprefix(f"{folder}/"): item.bytes for name, item in self.bucket.list(folder + "/").items()}

    def push(self, folder: str, *, mirror: bool = False) -> None:
        root = self.home / folder
        files = {f"{folder}/{p.relative_to(root).as_posix()}": p for p in sorted(root.rglob("*")) if p.is_file()}
        self.bucket.upload(files)
        if mirror:
            self.bucket.remove(self.bucket.list(folder + "/").keys() - files.keys())

    def pull(self, folder: str, names: Collection[str]) -> None:
        for name in self.bucket.list(folder + "/"):
            data = self.read_file(name) if name.rpartition("/")[2] in names else None
            if data is not None:
                super().write_file(name, data)

    def published(self) -> dict[str, int]:
        """Published artifacts, ``artifacts/<stage>/<key>``, and files without a manifest there, with their sizes.

        What another builder has locked is left out, unless its heart has not beaten for an hour.
        """
        listed = self.bucket.list("artifacts/")
        young = datetime.now(UTC) - ABANDONED
        locked = {n.removesuffix(".lock") for n, item in listed.items() if n.endswith(".lock") and item.modified > young}
        sizes: dict[str, int] = {}
        for name, item in listed.items():
            parts = name.split("/")
            if len(parts) > 3 and "/".join(parts[:3]) not in locked:
                sizes["/".join(parts[:3])] = sizes.get("/".join(parts[:3]), 0) + item.bytes
        return dict(sorted(sizes.items()))


def retry_while_unreachable(call: Callable[[], T]) -> T:
    """Call; where S3 does not answer, call again after 5 and after 30 seconds, as Prefect does with a task.

    Raises:
        UnreachableError: it does not answer then either.
        Exception: whatever else ``call`` raises.
    """
    for seconds in SILENCE_SECONDS:
        try:
            return call()
        except UnreachableError as error:
            LOG.warning("%s; trying again in %.0f s", error.what, seconds)
            time.sleep(seconds)
    return call()


def _base(stage: str, key: str) -> str:
    return f"artifacts/{stage}/{key}"


def _manifest_name(stage: str, key: str) -> str:
    return f"{_base(stage, key)}/{MANIFEST}"


def _files_name(manifest: Manifest) -> str:
    """The folder of an artifact's files, named by their content."""
    content = digest_of({name: entry.sha256 for name, entry in manifest.files.items()})[:16]
    return f"{_base(manifest.stage, manifest.key)}/{content}"


def _has(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.bytes and sha256_of(path) == entry.sha256
