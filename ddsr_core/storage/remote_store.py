"""A home on S3: artifacts are built in a cache folder on this machine, uploaded when complete, and downloaded by others.

``<url>/artifacts/<stage>/<key>/manifest.json`` is written last, and only if there is none: its presence says that the
artifact is complete. The artifact's files are beside it in a folder named by their content, so that two builders that
publish at the same time never mix their files. Unfinished builds stay in the cache folder of the machine that began them.
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
from ddsr_core.storage.files import sha256_of, storage_errors, write_atomically, write_json
from ddsr_core.storage.home import HOME_MARKER, MARK
from ddsr_core.storage.remote_lock import RemoteOwner, remote_lock
from ddsr_core.storage.s3 import SCHEME, Bucket
from ddsr_core.storage.stage import (
    MANIFEST,
    Artifact,
    FileEntry,
    Manifest,
    Stage,
    StageInput,
    has_content,
    is_key,
    is_whole,
)
from ddsr_core.storage.store import LOG, Owner, Store

#: A home as a parameter of a flow: a folder or ``s3://bucket/prefix``. A string, as a Path drops a slash of the URL.
Home = Annotated[str, BeforeValidator(str)]
#: A lock without a heartbeat for this long is abandoned. The clocks of this machine and of S3 differ by less than 15
#: minutes, or S3 would refuse every request.
ABANDONED = timedelta(hours=1)
#: Pauses before a request that S3 did not answer is repeated.
RETRY_SECONDS = (5.0, 30.0)
T = TypeVar("T")


def open_store(home: str | Path) -> Store:
    """The store of a home.

    Args:
        home: a folder, or ``s3://bucket/prefix``.

    Raises:
        ConfigError: a URL that is not on S3, or without a bucket.
        StorageError: s3fs is not installed.
    """
    text = str(home)
    if text.startswith(SCHEME):
        return RemoteStore(text)
    if "://" in text:
        raise ConfigError("a home is a folder or a URL on S3", where=text, fix="name a folder or s3://bucket/prefix")
    return Store(Path(home))


def cache_folder(url: str) -> Path:
    """The folder of this machine's copy of a home on S3: below $DDSR_CACHE, by default ~/.cache/ddsr."""
    root = Path(os.environ.get("DDSR_CACHE") or "~/.cache/ddsr").expanduser().absolute()
    return root / hashlib.sha256(url.encode()).hexdigest()[:16]


class RemoteStore(Store):
    """The artifacts below a URL on S3, with local copies of those that were built or used on this machine.

    Args:
        url: ``s3://bucket/prefix``.
    """

    def __init__(self, url: str) -> None:
        self.bucket = Bucket(url)
        super().__init__(cache_folder(self.bucket.url))
        self.url = self.bucket.url
        self._marked = False

    def find(self, stage: str, key: str) -> Artifact | None:
        """The artifact, downloaded to the cache folder, if it is published and complete; None if missing or damaged.

        Raises:
            StorageError: S3 refuses or cannot be reached, or the cache folder cannot be written.
        """
        manifest = self._published(stage, key)
        return None if manifest is None else self._fetch(manifest)

    def build(
        self, stage: Stage, config: StageConfig, inputs: Mapping[str, StageInput], runtime: Runtime | None = None
    ) -> tuple[Artifact, bool]:
        """As `Store.build`, across all machines. An existing artifact is found without taking the lock.

        Raises:
            StorageError: also if S3 refuses or cannot be reached.
        """
        existing = self.find(stage.name, stage.key(config, inputs))
        return (existing, True) if existing is not None else super().build(stage, config, inputs, runtime)

    @contextmanager
    def locked(self, name: str, run: str = "", what: str | None = None, wait: bool = True) -> Iterator[None]:
        """As `Store.locked`, across all machines."""
        with super().locked(name, run, what, wait):
            owner = RemoteOwner(**Owner.here(run).model_dump(), cache=self._cache_id())
            with remote_lock(self.bucket, f"{name}.lock", owner, what or name, wait):
                yield

    def _build_locked(
        self, stage: Stage, key: str, config: StageConfig, inputs: Mapping[str, StageInput], runtime: Runtime
    ) -> Artifact:
        if self.bucket.read(_manifest_name(stage.name, key)) is not None:  # damaged, or `find` would have returned it
            self.unpublish(stage.name, key)
        built = super().find(stage.name, key)  # a build that was interrupted while it was published
        if built is None:
            with self._shared_photo_cache(runtime.photo_cache):
                built = super()._build_locked(stage, key, config, inputs, runtime)
        return self._publish(built)

    @contextmanager
    def _shared_photo_cache(self, folder: Path | None) -> Iterator[None]:
        """Download a photo cache before it is used, and publish it afterwards.

        On S3 it consists of an index, relative path -> SHA-256, and one object per content below ``files/``. The index is
        written last, so that everything it names exists.
        """
        if folder is None:
            yield
            return
        name = folder.relative_to(self.home).as_posix()
        before = self._download_photo_cache(name, folder)
        yield
        index = {path.relative_to(folder).as_posix(): sha256_of(path) for path in folder.rglob("*") if path.is_file()}
        fresh = {digest: folder / path for path, digest in index.items() if digest not in set(before.values())}
        self.bucket.upload({f"{name}/files/{digest}": path for digest, path in fresh.items()})
        self.bucket.write(f"{name}/index.json", json.dumps(index).encode())
        gone = set(before.values()) - set(index.values())
        self.bucket.remove([f"{name}/files/{digest}" for digest in gone])

    def _download_photo_cache(self, name: str, folder: Path) -> dict[str, str]:
        """Make the folder equal to the published one, and return its index. An incomplete photo cache is discarded."""
        published = self.bucket.read(f"{name}/index.json")
        index: dict[str, str] = {} if published is None else json.loads(published[0])
        with storage_errors(self.home):
            for file in [file for file in folder.rglob("*") if file.is_file()]:
                if file.relative_to(folder).as_posix() not in index:
                    file.unlink()
            missing = {p: d for p, d in index.items() if not (folder / p).is_file() or sha256_of(folder / p) != d}
            first = {digest: folder / path for path, digest in missing.items()}
            if not self.bucket.download({f"{name}/files/{digest}": path for digest, path in first.items()}):
                LOG.warning("%s: incomplete in %s; it is discarded", name, self.url)
                shutil.rmtree(folder)
                return {}
            for path, digest in missing.items():
                if folder / path != first[digest]:
                    write_atomically(folder / path, first[digest].read_bytes())
        return index

    def _published(self, stage: str, key: str) -> Manifest | None:
        published = self.bucket.read(_manifest_name(stage, key))
        try:
            manifest = None if published is None else Manifest.model_validate_json(published[0])
        except ValueError:
            manifest = None
        if manifest is not None and manifest.belongs_to(stage, key):
            return manifest
        if published is not None:
            LOG.warning("%s: its manifest is damaged; it will be rebuilt", _base(stage, key))
        return None

    def _fetch(self, manifest: Manifest) -> Artifact | None:
        """The local copy, downloaded if it is missing or differs; None if the artifact on S3 is damaged."""
        stage, key = manifest.stage, manifest.key
        folder = self.folder(stage, key)
        with storage_errors(self.home):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(key + ".fetch.lock")):
                local = super().find(stage, key)
                if local is not None and local.manifest.files == manifest.files:
                    return Artifact(manifest, folder)
                fresh = folder.with_name(key + ".fetch")
                if not self._download(manifest, fresh):
                    LOG.warning("%s: damaged in %s; it will be rebuilt", _base(stage, key), self.url)
                    shutil.rmtree(fresh, ignore_errors=True)
                    return None
                write_json(fresh / MANIFEST, manifest.model_dump(mode="json"))
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(fresh, folder)
                return Artifact(manifest, folder)

    def _download(self, manifest: Manifest, fresh: Path) -> bool:
        """Download the files that an interrupted download lacks. Returns whether all now have the manifest's digests."""
        place = _files_name(manifest)
        entries = manifest.files.items()
        missing = {f"{place}/{name}": fresh / name for name, entry in entries if not has_content(fresh / name, entry)}
        fresh.mkdir(exist_ok=True)
        return self.bucket.download(missing) and is_whole(fresh, manifest)

    def _publish(self, built: Artifact) -> Artifact:
        """Upload the files, then the manifest. If another builder has published meanwhile, its artifact is used."""
        manifest, place = built.manifest, _files_name(built.manifest)
        files = {f"{place}/{name}": built.path / name for name in manifest.files}
        self.bucket.upload(files)
        text = (built.path / MANIFEST).read_bytes()
        if self.bucket.create(_manifest_name(manifest.stage, manifest.key), text) is not None:
            return built
        first = self._published(manifest.stage, manifest.key)
        if first is None or first.files != manifest.files:
            self.bucket.remove(files)
        fetched = None if first is None else self._fetch(first)
        if fetched is None:
            base = f"{self.url}/{_base(manifest.stage, manifest.key)}"
            raise StorageError("another builder has published a damaged artifact", where=base, fix="run again")
        return fetched

    def unpublish(self, stage: str, key: str) -> None:
        """Remove an artifact from S3; the local copy stays."""
        self.bucket.remove([_manifest_name(stage, key)])  # first, so that no process finds an incomplete artifact
        self.bucket.remove(self.bucket.list(_base(stage, key) + "/"))

    def _cache_id(self) -> str:
        """An id of this cache folder that is unique across machines."""
        path = self.home / "cache-id"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                write_atomically(path, uuid.uuid4().hex.encode())
        return path.read_text()

    def forget(self, artifact: Artifact) -> None:
        self.unpublish(artifact.manifest.stage, artifact.key)
        super().forget(artifact)

    def mark(self) -> None:
        super().mark()
        if not self._marked:
            if self.bucket.read(HOME_MARKER) is None:
                self.bucket.write(HOME_MARKER, MARK)
            self._marked = True

    def is_marked(self) -> bool:
        return self.bucket.read(HOME_MARKER) is not None or any(
            name.endswith(f"/{MANIFEST}") and self._published(*name.split("/")[1:3]) is not None
            for name in self.bucket.list("artifacts/")
        )

    def check(self) -> None:
        super().check()
        self.bucket.write(".writable", b"")
        self.bucket.remove([".writable"])

    def read_file(self, name: str) -> bytes | None:
        current = self.bucket.read(name)
        return None if current is None else current[0]

    def write_file(self, name: str, data: bytes) -> None:
        self.bucket.write(name, data)

    def remove_file(self, name: str) -> None:
        self.bucket.remove([name])

    def sizes(self, folder: str) -> dict[str, int]:
        return {name.removeprefix(f"{folder}/"): item.bytes for name, item in self.bucket.list(folder + "/").items()}

    def holds(self, folder: str, files: Mapping[str, FileEntry]) -> bool:
        return self.sizes(folder) == {name: entry.bytes for name, entry in files.items()}

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
        """Sizes in bytes of published artifacts, ``artifacts/<stage>/<key>``, including those without a manifest.

        What lies in folders that are not called by a key is not ours.

        Artifacts that another builder has locked are left out, unless its lock has had no heartbeat for an hour.
        """
        listed = self.bucket.list("artifacts/")
        young = datetime.now(UTC) - ABANDONED
        locked = {n.removesuffix(".lock") for n, item in listed.items() if n.endswith(".lock") and item.modified > young}
        sizes: dict[str, int] = {}
        for name, item in listed.items():
            parts = name.split("/")
            if len(parts) > 3 and is_key(parts[2]) and "/".join(parts[:3]) not in locked:
                sizes["/".join(parts[:3])] = sizes.get("/".join(parts[:3]), 0) + item.bytes
        return dict(sorted(sizes.items()))


def retry_while_unreachable(call: Callable[[], T]) -> T:
    """Call a function; if S3 does not answer, call it again after 5 and after 30 seconds, as Prefect does with a task.

    Raises:
        UnreachableError: S3 does not answer the third time either.
        Exception: whatever else ``call`` raises.
    """
    for seconds in RETRY_SECONDS:
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
