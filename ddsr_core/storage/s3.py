"""Objects below ``s3://bucket/prefix``: the operations that a home on S3 needs, and messages for S3's errors.

Credentials, region and endpoint come from the usual places: ``AWS_ACCESS_KEY_ID``, ``AWS_PROFILE``, ``AWS_ENDPOINT_URL``
and so on, or the machine's role.
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
#: Files transferred at once. A large file is held in memory in parts of 50 MB.
TRANSFERS = 8
#: Objects that S3 deletes in one request, at most.
MAX_DELETED = 1000
SCHEME = "s3://"

ABSENT = frozenset({"NoSuchKey", "404"})
TAKEN = frozenset({"PreconditionFailed", "ConditionalRequestConflict"})
BUSY = frozenset({"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "500", "503"})
REFUSED = frozenset(
    {"AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "AccountProblem"}
)
CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and check the bucket's policy"


@dataclass(frozen=True)
class Listed:
    """Size and time of last modification of one object, as S3 lists it."""

    bytes: int
    modified: datetime


class Bucket:
    """The objects below a URL. Names are relative to it.

    Args:
        url: ``s3://bucket`` or ``s3://bucket/prefix``.

    Raises:
        ConfigError: no bucket in the URL.
        StorageError: s3fs is not installed. Every method raises it if the bucket is missing or S3 refuses, and its
            subclass `UnreachableError` if S3 cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        self.bucket, self.prefix = parts.netloc, parts.path.strip("/")
        if not self.bucket:
            raise ConfigError("no bucket in the URL", where=url, fix="write s3://bucket or s3://bucket/prefix")
        try:
            import s3fs  # an optional extra
        except ImportError as error:
            raise StorageError("a home on S3 needs s3fs", where=url, fix="pip install 'ddsr[s3]'") from error
        settings = {"connect_timeout": CONNECT_SECONDS}
        self._fs = s3fs.S3FileSystem(use_listings_cache=False, config_kwargs=settings)

    def read(self, name: str) -> tuple[bytes, str] | None:
        """An object's bytes and ETag; None if there is none."""
        from fsspec.asyn import sync  # comes with the optional extra s3fs

        with self._errors():
            try:
                answer = self._fs.call_s3("get_object", Bucket=self.bucket, Key=self._key(name))
                return sync(self._fs.loop, answer["Body"].read), str(answer["ETag"])
            except OSError as error:
                if _code(error) in ABSENT:
                    return None
                raise

    def write(self, name: str, data: bytes) -> None:
        """Write an object; an existing one is replaced."""
        self._put(name, data)

    def create(self, name: str, data: bytes) -> str | None:
        """Write an object that does not exist yet (``If-None-Match: *``). Returns its ETag, or None if it exists."""
        return self._put(name, data, IfNoneMatch="*")

    def replace(self, name: str, data: bytes, etag: str) -> str | None:
        """Replace an object that still has this ETag (``If-Match``). Returns its new ETag, or None if it has changed."""
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
            listing: dict[str, Any] = self._fs.find(self._path(prefix), detail=True)
        skip = len(self._path("")) + (1 if self.prefix else 0)
        return {path[skip:]: Listed(int(item["size"]), item["LastModified"]) for path, item in listing.items()}

    def upload(self, files: Mapping[str, Path]) -> None:
        """Upload local files, several at once."""
        if not files:
            return
        with self._errors():
            self._fs.put([str(path) for path in files.values()], [self._path(n) for n in files], batch_size=TRANSFERS)

    def download(self, files: Mapping[str, Path]) -> bool:
        """Download objects to local files, several at once. Returns False if one of them is missing."""
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
        """Delete objects; names that do not exist are ignored."""
        if names:
            with self._errors():
                objects = [{"Key": self._key(name)} for name in names]
                for at in range(0, len(objects), MAX_DELETED):  # s3fs's own method treats [ and * in a name as a pattern
                    chunk = {"Objects": objects[at : at + MAX_DELETED], "Quiet": True}
                    self._fs.call_s3("delete_objects", Bucket=self.bucket, Delete=chunk)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}".strip("/")

    def _path(self, name: str) -> str:
        return f"{self.bucket}/{self._key(name)}"

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors and timeouts of S3 into a `StorageError`; errors of local files pass through."""
        from botocore.exceptions import BotoCoreError  # comes with the optional extra s3fs

        try:
            yield
        except (OSError, BotoCoreError) as error:
            explained = self._explain(error)
            if explained is None:
                raise
            raise explained from error

    def _explain(self, error: Exception) -> StorageError | None:
        from botocore import exceptions as boto  # comes with the optional extra s3fs

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
            fix = "check the URL in --home; the server must support conditional writes (If-None-Match, If-Match)"
            return StorageError(f"S3 rejects the request: {code or type(error).__name__}: {error}", where=self.url, fix=fix)
        return None


def _code(error: Exception) -> str | None:
    """S3's error code behind an exception of s3fs."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    return str(response["Error"].get("Code")) if response else None
