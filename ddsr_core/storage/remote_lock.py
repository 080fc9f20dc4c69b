"""A lock as an object on S3: taken by writing it where none is, kept by a heartbeat, lost when the heart has stopped.

S3 frees no lock when a process dies, so whoever holds one writes it anew every `HEARTBEAT_SECONDS`. A process that waits
takes over a lock that it has not seen change for `STALE_SECONDS`: by its own clock, so that clocks need not agree. Every
write is conditional (``If-None-Match``, ``If-Match``), so that of two that want the lock one gets it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from pydantic import Field

from ddsr_core.errors import StorageError
from ddsr_core.storage.s3 import Bucket
from ddsr_core.storage.store import LOG, Owner, held_by_another, now

HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 60.0
POLL_SECONDS = 2.0


class RemoteOwner(Owner):
    """The content of a lock.

    Attributes:
        cache: names the cache folder of the holder; who holds the same artifact's local lock there knows that it is dead.
        token: of this very lock, so that its holder knows it again.
        beat: when it was last written.
    """

    cache: str
    token: str = Field(default_factory=lambda: uuid.uuid4().hex)
    beat: str = ""

    def beating(self) -> bytes:
        """The lock as it is written now."""
        return self.model_copy(update={"beat": now("microseconds")}).model_dump_json().encode()


@contextmanager
def remote_lock(bucket: Bucket, name: str, owner: RemoteOwner, what: str | None = None, wait: bool = True) -> Iterator[None]:
    """Hold the lock ``name``; waits while another holds it.

    Args:
        what: for the message of those who wait: what is done under the lock.

    Raises:
        StorageError: S3 refuses or cannot be reached when the lock is taken; or another holds it, and ``wait`` is False.
    """
    held = _Held(bucket, name, owner, _take(bucket, name, owner, what or name.removesuffix(".lock"), wait))
    held.heart.start()
    try:
        yield
    finally:
        held.release()


def _take(bucket: Bucket, name: str, owner: RemoteOwner, what: str, wait: bool) -> str:
    """Wait for the lock, write it, return its ETag."""
    seen, since = "", 0.0
    while True:
        other = bucket.read(name)
        if other is None:
            taken = bucket.create(name, owner.beating())
            if taken is not None:
                return taken
            continue
        holder, etag = _parse(other[0]), other[1]
        if etag != seen:
            if not seen:
                LOG.warning("waiting for %s by %s", what, holder or "another process")
            elif not wait:  # its heart has beaten meanwhile
                raise held_by_another(what, holder or "another process")
            seen, since = etag, time.monotonic()
        is_own = holder is not None and holder.cache == owner.cache
        if is_own or time.monotonic() - since >= STALE_SECONDS:
            taken = bucket.replace(name, owner.beating(), etag)
            if taken is not None:
                LOG.warning("%s: its builder (%s) has died; going on in its place", name.removesuffix(".lock"), holder)
                return taken
            continue
        time.sleep(min(POLL_SECONDS, STALE_SECONDS))


def _parse(data: bytes) -> RemoteOwner | None:
    try:
        return RemoteOwner.model_validate_json(data)
    except ValueError:  # not written by us: it becomes stale like any other
        return None


class _Held:
    """A lock that is held: a thread writes it anew until it is released."""

    def __init__(self, bucket: Bucket, name: str, owner: RemoteOwner, etag: str) -> None:
        self.bucket, self.name, self.owner = bucket, name, owner
        self.etag: str | None = etag
        self.done = Event()
        self.heart = Thread(target=self._beat, name=f"heartbeat {name}", daemon=True)

    def _beat(self) -> None:
        while self.etag is not None and not self.done.wait(HEARTBEAT_SECONDS):
            try:
                self.etag = self.bucket.replace(self.name, self.owner.beating(), self.etag) or self._own_etag()
            except StorageError as error:  # the network may be back at the next beat
                LOG.warning("%s: no heartbeat: %s", self.name, error.what)
        if self.etag is None:
            LOG.warning("%s: taken over by another builder; the first to publish wins", self.name)

    def _own_etag(self) -> str | None:
        """The lock's ETag if it is still ours: an answer that was lost has left it changed by ourselves."""
        there = self.bucket.read(self.name)
        holder = None if there is None else _parse(there[0])
        return there[1] if there and holder and holder.token == self.owner.token else None

    def release(self) -> None:
        self.done.set()
        self.heart.join()
        try:
            if self._own_etag() is not None:
                self.bucket.remove([self.name])
        except StorageError as error:  # it becomes stale
            LOG.warning("%s: not removed: %s", self.name, error.what)
