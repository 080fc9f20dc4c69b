"""A lock as an object on S3: created by its holder, renewed by a heartbeat, taken over when the heartbeat stops.

S3 releases no lock when a process dies, so the holder rewrites the object every `HEARTBEAT_SECONDS`. A process that waits
takes over a lock that it has not seen change for `STALE_SECONDS`, measured by its own clock, so that clocks need not
agree. Every write is conditional (``If-None-Match``, ``If-Match``), so that only one of two contenders gets the lock.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from pydantic import Field

from ddsr_core.errors import StorageError
from ddsr_core.storage.files import now
from ddsr_core.storage.s3 import Bucket
from ddsr_core.storage.store import LOG, Owner, held_by_another

HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 60.0
POLL_SECONDS = 2.0


class RemoteOwner(Owner):
    """The content of a lock.

    Attributes:
        cache: id of the holder's cache folder. A process that has the local lock of the same artifact in that folder
            knows that the holder is dead.
        token: random text by which the holder recognizes its own lock.
        beat: time of the last heartbeat.
    """

    cache: str
    token: str = Field(default_factory=lambda: uuid.uuid4().hex)
    beat: str = ""

    def beating(self) -> bytes:
        """The content of the lock with the current time."""
        return self.model_copy(update={"beat": now("microseconds")}).model_dump_json().encode()


@contextmanager
def remote_lock(bucket: Bucket, name: str, owner: RemoteOwner, what: str | None = None, wait: bool = True) -> Iterator[None]:
    """Hold the lock ``name``; wait while another process holds it.

    Args:
        what: what is done under the lock, shown to processes that wait.
        wait: False raises an error instead of waiting for a live holder.

    Raises:
        StorageError: S3 refuses or cannot be reached while the lock is taken, or another process holds the lock and
            ``wait`` is False.
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
            elif not wait:  # its holder has renewed it meanwhile
                raise held_by_another(what, holder or "another process")
            seen, since = etag, time.monotonic()
        is_own = holder is not None and holder.cache == owner.cache
        if is_own or time.monotonic() - since >= STALE_SECONDS:
            taken = bucket.replace(name, owner.beating(), etag)
            if taken is not None:
                LOG.warning(
                    "%s: its builder (%s) has died; this process continues the build", name.removesuffix(".lock"), holder
                )
                return taken
            continue
        time.sleep(min(POLL_SECONDS, STALE_SECONDS))


def _parse(data: bytes) -> RemoteOwner | None:
    try:
        return RemoteOwner.model_validate_json(data)
    except ValueError:  # not written by ddsr: it becomes stale like any other
        return None


class _Held:
    """A lock that this process holds. A thread renews it until it is released."""

    def __init__(self, bucket: Bucket, name: str, owner: RemoteOwner, etag: str) -> None:
        self.bucket, self.name, self.owner = bucket, name, owner
        self.etag: str | None = etag
        self.done = Event()
        self.heart = Thread(target=self._beat, name=f"heartbeat {name}", daemon=True)

    def _beat(self) -> None:
        while self.etag is not None and not self.done.wait(HEARTBEAT_SECONDS):
            try:
                self.etag = self.bucket.replace(self.name, self.owner.beating(), self.etag) or self._own_etag()
            except StorageError as error:  # the network may be back at the next heartbeat
                LOG.warning("%s: no heartbeat: %s", self.name, error.what)
        if self.etag is None:
            LOG.warning("%s: taken over by another builder; the one that publishes first wins", self.name)

    def _own_etag(self) -> str | None:
        """The lock's ETag if it is still ours. Our own write may have changed it, if S3's answer was lost."""
        current = self.bucket.read(self.name)
        holder = None if current is None else _parse(current[0])
        return current[1] if current and holder and holder.token == self.owner.token else None

    def release(self) -> None:
        self.done.set()
        self.heart.join()
        try:
            if self._own_etag() is not None:
                self.bucket.remove([self.name])
        except StorageError as error:  # it becomes stale and is taken over
            LOG.warning("%s: not removed: %s", self.name, error.what)
