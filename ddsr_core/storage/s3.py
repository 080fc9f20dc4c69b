"""Objects below ``s3://bucket/prefix``: the few operations that a home on S3 needs, and what S3's refusals mean.

Credentials, region and endpoint come from where every S3 client takes them: ``AWS_ACCESS_KEY_ID``, ``AWS_PROFILE``,
``AWS_ENDPOINT_URL`` and so on, or the machine's role.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ddsr_core.errors import ConfigError, StorageError, UnreachableError

CONNECT_SECONDS = 10
#: Files on their way at once; a large one is held in memory in parts of 50 MB.
TRANSFERS = 8
#: Objects that S3 removes in one request.
MOST_REMOVED = 1000
SCHEME = "s3://"

ABSENT = frozenset({"NoSuchKey", "404"})
TAKEN = frozenset({"PreconditionFailed", "ConditionalRequestConflict"})
BUSY = frozenset({"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "500", "503"})
REFUSED = frozenset(
    {"AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "AccountProblem"}
)
CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and see that the bucket's policy allows it"


@dataclass(frozen=True)
class Listed:
    """One object of a listing: its size, and when the server last saw it written."""

    bytes: int
    modified: datetime


class Bucket:
    """The objects below an URL. Names are relative to it.

    Args:
        url: ``s3://bucket`` or ``s3://bucket/prefix``.

    Raises:
        ConfigError: no bucket in the URL.
        StorageError: s3fs is not installed. Every method: the bucket is missing, S3 refuses, or (`UnreachableError`)
            cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        self.bucket, self.prefix = parts.netloc, parts.path.strip("/")
        if not self.bucket:
            raise ConfigError("no bucket in the URL", where=url, fix="write s3://bucket or s3://bucket/prefix")
        try:
            import s3fs
        except ImportError as error:
            raise StorageError("a home on S3 needs s3fs", where=url, fix="pip install 'ddsr[s3]'") from error
        settings = {"connect_timeout": CONNECT_SECONDS}
        self._fs = s3fs.S3FileSystem(use_listings_cache=False, config_kwargs=settings)

    def read(self, name: str) -> tuple[bytes, str] | None:
        """An object's bytes and ETag; None if there is none."""
        from fsspec.asyn import sync

        with self._errors():
            try:
                answer = self._fs.call_s3("get_object", Bucket=self.bucket, Key=self._key(name))
                return sync(self._fs.loop, answer["Body"].read), str(answer["ETag"])
            except OSError as error:
                if _code(error) in ABSENT:
                    return None
                raise

    def write(self, name: str, data: bytes) -> None:
        """Write an object, whether it is there or not."""
        self._put(name, data)

    def create(self, name: str, data: bytes) -> str | None:
        """Write an object that is not there yet (``If-None-Match: *``): its ETag, or None if it is there."""
        return self._put(name, data, IfNoneMatch="*")

    def replace(self, name: str, data: bytes, etag: str) -> str | None:
        """Write an object that still has this ETag (``If-Match``): its new ETag, or None if another has changed it."""
        return self._put(name, data, IfMatch=etag)

    def _put(self, name: str, data: bytes, **condition: str) -> str | None:
        with self._errors():
            try:
                answer = self._fs.call_s3("put_object", Bucket=self.bucket, Key=self._key(name), Body=data, **condition)
                return str(answer["ETag"])
            except OSError as error:
                if condition and _code(error) in TAKEN | ABSENT:
                    return None
                raise

    def list(self, prefix: str) -> dict[str, Listed]:
        """Every object whose name begins with the folder ``prefix``."""
        with self._errors():
            found: dict[str, Any] = self._fs.find(self._path(prefix), detail=True)
        skip = len(self._path("")) + (1 if self.prefix else 0)
        return {path[skip:]: Listed(int(item["size"]), item["LastModified"]) for path, item in found.items()}

    def upload(self, files: Mapping[str, Path]) -> None:
        """Write local files, several at once."""
        if not files:
            return
        with self._errors():
            self._fs.put([str(path) for path in files.values()], [self._path(n) for n in files], batch_size=TRANSFERS)

    def download(self, files: Mapping[str, Path]) -> bool:
        """Bring objects into local files, several at once. False if one of them is missing."""
        if not files:
            return True
        for path in files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._errors():
            try:
                self._fs.get([self._path(n) for n in files], [str(path) for path in files.values()], batch_size=TRANSFERS)
            except FileNotFoundError as error:
                if _code(error) in ABSENT:
                    return False
                raise
        return True

    def remove(self, names: Collection[str]) -> None:
        """Remove objects, whether they are there or not."""
        if names:
            with self._errors():
                objects = [{"Key": self._key(name)} for name in names]
                for at in range(0, len(objects), MOST_REMOVED):  # s3fs' own way takes [ and * in a name for a pattern
                    chunk = {"Objects": objects[at : at + MOST_REMOVED], "Quiet": True}
                    self._fs.call_s3("delete_objects", Bucket=self.bucket, Delete=chunk)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}".strip("/")

    def _path(self, name: str) -> str:
        return f"{self.bucket}/{self._key(name)}"

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what S3 answers, or that it does not, into a `StorageError`; local errors pass."""
        from botocore.exceptions import BotoCoreError

        try:
            yield
        except (OSError, BotoCoreError) as error:
            explained = self._explain(error)
            if explained is None:
                raise
            raise explained from error

    def _explain(self, error: Exception) -> StorageError | None:
        from botocore import exceptions as boto

        code = _code(error)
        if code == "NoSuchBucket":
            return StorageError(f"there is no bucket {self.bucket!r}", where=self.url, fix="create it, or correct --home")
        if code in REFUSED:
            return StorageError(f"S3 refuses access ({code}: {error})", where=self.url, fix=CREDENTIALS)
        if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
            return StorageError(f"no S3 credentials: {error}", where=self.url, fix=CREDENTIALS)
        unreachable = boto.ConnectionError | boto.HTTPClientError | TimeoutError
        if code in BUSY or isinstance(error, unreachable):
            fix = "check the network and AWS_ENDPOINT_URL, and run again: finished stages are kept"
            return UnreachableError(f"S3 does not answer: {error}", where=self.url, fix=fix)
        if code is not None or isinstance(error, boto.BotoCoreError):
            fix = "check the URL in --home; the server must know conditional writes (If-None-Match, If-Match)"
            return StorageError(f"S3 refuses: {code or type(error).__name__}: {error}", where=self.url, fix=fix)
        return None


def _code(error: Exception) -> str | None:
    """S3's error code behind what s3fs raises."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    return str(response["Error"].get("Code")) if response else None
