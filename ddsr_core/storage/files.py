"""Atomic writes of files, their digests, and messages for errors of the operating system."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from ddsr_core.config import digest_of
from ddsr_core.errors import StorageError

#: Suffix of files that are being written.
TEMPORARY = ".tmp"
#: How file systems say that they do not copy in the kernel, or not from the other one.
_NO_RANGE_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})
#: Field of a record that holds the digest of the others.
_SEAL = "check"
_OTHER_HOME = "choose another folder with --home"
_FIXES = {
    errno.ENOSPC: "free some space (`ddsr gc --delete`) and run again: finished stages are kept",
    errno.EDQUOT: "raise the quota or choose another folder with --home: finished stages are kept",
    errno.EACCES: f"{_OTHER_HOME}, or change the permissions",
    errno.EPERM: f"{_OTHER_HOME}, or change the permissions",
    errno.EROFS: f"the file system is read-only: {_OTHER_HOME}",
    errno.EEXIST: "there is a file where a folder is needed: move it, or choose another folder with --home",
    errno.ENOTDIR: "there is a file where a folder is needed: move it, or choose another folder with --home",
    errno.EIO: "the disk reports an error: check it, or choose another folder with --home, and run again",
}


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turn errors of the operating system (full disk, no permission, disk error) into a `StorageError` with a fix.

    Args:
        where: reported if the error names no file.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FIXES:
            raise
        place = error.filename or where
        raise StorageError(f"cannot write: {os.strerror(error.errno)}", where=place, fix=_FIXES[error.errno]) from error


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, streamed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing. Afterwards, ``path`` holds the complete new content or, after an error, the old one.

    The bytes go to a temporary file beside ``path``, which is synced and renamed. Its name has a fixed length, as ``path``
    may have the longest name that the file system allows, and belongs to one thread: several may write ``path`` at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = f"{os.getpid()} {threading.get_ident()} ".encode() + os.fsencode(path.name)
    temporary = path.with_name(f".{hashlib.sha256(writer).hexdigest()[:16]}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def remove_temporary_files(folder: Path) -> None:
    """Remove temporary files below a folder that interrupted writes have left."""
    for path in folder.rglob(f"*{TEMPORARY}"):
        path.unlink()


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds either its old content or the complete new content."""
    with writing_atomically(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as readable JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A record with a digest of itself, which `unsealed` compares: a damaged record must not be believed."""
    bare = {name: item for name, item in value.items() if name != _SEAL}
    return {**bare, _SEAL: digest_of(bare)}


def unsealed(data: bytes, where: object, fix: str) -> dict[str, Any]:
    """The record in a file that was written with `sealed`. One without a digest, of an earlier version, is believed.

    Args:
        data: content of the file.
        where, fix: of the message.

    Raises:
        StorageError: it is damaged.
    """
    try:
        value = json.loads(data)
        whole = isinstance(value, dict) and value.pop(_SEAL, None) in (None, digest_of(value))
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise StorageError("the file is damaged", where=where, fix=fix)
    return dict(value)


def copy_file(source: Path | str, target: Path | str) -> None:
    """Copy the bytes of a file. File systems that can (Btrfs, XFS, NFS) share the blocks until one of the two is changed."""
    if not hasattr(os, "copy_file_range"):  # Linux alone has it
        shutil.copyfile(source, target)
        return
    with open(source, "rb") as old, open(target, "wb") as new:
        try:
            while os.copy_file_range(old.fileno(), new.fileno(), 1 << 30):
                pass
        except OSError as error:
            if error.errno not in _NO_RANGE_COPY:
                raise
            shutil.copyfile(source, target)


def allocate(file: BinaryIO, size: int) -> None:
    """Extend a new file to ``size`` bytes and reserve the disk space for them.

    Raises:
        OSError: the disk is full.
    """
    file.flush()
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    written = file.seek(0, os.SEEK_END)
    while written < size:
        written += file.write(bytes(min(1 << 20, size - written)))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder (files created, renamed or removed) survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make every file below a folder, and its name, survive a power failure."""
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))


def now(precision: str = "seconds") -> str:
    """UTC as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec=precision)
