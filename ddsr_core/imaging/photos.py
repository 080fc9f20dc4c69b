"""What counts as a photo. Every command, flow and nightly run reads pictures through this module.

A photo source is a folder, an image file, a glob pattern, or Parquet (a file, or a folder of them, see
`ddsr_core.imaging.parquet_photos`). In a folder a file is a photo if its content begins like an image, whatever its suffix,
or if its suffix says so. Linked folders are followed, and each folder is read once. Hidden files and folders are
skipped, and so is everything below the home of ddsr (`ddsr_core.storage.home`), so that no run reads its own results.

What looks like a photo and cannot be used (damaged, a camera's raw format, a named pipe, a folder without permission) is a
`Photo`, too. Reading it raises `UnusableImage` with the reason, and so every stage counts it.
"""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ddsr_core.config import digest_of
from ddsr_core.errors import ChangedInputError, InputError
from ddsr_core.imaging.decode import HEIF, NOT_READABLE, UnusableImage, decode_rgb, plain_reason
from ddsr_core.imaging.parquet_photos import find_parquet, parquet_pictures
from ddsr_core.storage.home import RESULT_FOLDERS, is_home
from ddsr_core.storage.stage import Source, require_whole

_HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
#: Files with these suffixes are photos. They count as unusable if their content is not an image.
IMAGE_SUFFIXES = frozenset(
    {
        ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif",
        ".avif", ".jp2", ".j2k", ".jpx", ".j2c", ".ppm", ".pgm", ".pnm", ".pbm", ".tga", ".qoi", ".sgi", ".pcx",
        *(_HEIF_SUFFIXES if HEIF else ()),
    }
)  # fmt: skip
#: Pictures that are not decoded, by suffix: raw formats of cameras (Pillow would read their thumbnail) and others.
UNSUPPORTED_SUFFIXES = frozenset(
    {
        ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".srf", ".raf", ".orf", ".rw2", ".rwl",
        ".pef", ".3fr", ".iiq", ".x3f", ".kdc", ".dcr", ".mrw", ".erf", ".mef", ".mos", ".raw", ".jxl", ".psd",
        ".psb", ".xcf", ".exr", ".hdr", ".svg", ".eps", ".ico", ".icns", ".blp", ".dds", ".fits", ".jxr", ".heics",
        ".avifs",
        *(() if HEIF else _HEIF_SUFFIXES),
    }
)  # fmt: skip
#: Prefix of the reason that replaces the digest of an image that cannot be read.
UNREADABLE = "unreadable: "
_HEAD_BYTES = 16
_SIGNATURES = (
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"qoif", b"II*\0", b"MM\0*",
    b"\0\0\0\x0cjP  \r\n", b"\xff\x4f\xff\x51",
)  # fmt: skip


@dataclass(frozen=True)
class Photo:
    """One image of a source, not yet read.

    Attributes:
        name: path relative to the source, or the path in a row of a Parquet file; bytes that are not text are escaped.
        load: returns the bytes of the file; raises OSError or `UnusableImage` if it cannot be used.
        path: of the file; None for a row of a Parquet file.
    """

    name: str
    load: Callable[[], bytes]
    path: Path | None = None

    def content(self) -> bytes:
        """The content of the file.

        Raises:
            UnusableImage: it cannot be read.
        """
        try:
            return self.load()
        except OSError as error:
            reason = plain_reason(error)
            raise UnusableImage(
                "cannot be read", where=self.name, fix=f"repair or remove it ({reason})", reason=f"unreadable: {reason}"
            ) from error

    def content_unchanged(self, digest: str) -> bytes:
        """The content of the file, which was read before.

        Args:
            digest: `digest` of the content then.

        Raises:
            ChangedInputError: the content has changed, can no longer be read, or could not be read before.
            UnusableImage: it could not be read before, for the same reason.
        """
        try:
            data = self.content()
            if hashlib.sha256(data).hexdigest() == digest:
                return data
        except UnusableImage as error:
            if f"{UNREADABLE}{error.reason}" == digest:
                raise
        raise ChangedInputError("a photo changed during the run", where=self.name, fix="run again")

    def pinned(self, digest: str) -> Photo:
        """The same photo; reading it raises what `content_unchanged` raises."""
        return replace(self, load=lambda: self.content_unchanged(digest))

    def read(self) -> np.ndarray:
        """Decode the image to ``uint8 (H, W, 3)``.

        Raises:
            UnusableImage: the file cannot be read or decoded.
        """
        return decode_rgb(self.content(), self.name)

    def read_once(self) -> tuple[str, np.ndarray | UnusableImage]:
        """`digest` and pixels from one reading of the file; the error in place of pixels if it cannot be decoded."""
        digest = ""
        try:
            data = self.content()
            digest = hashlib.sha256(data).hexdigest()
            return digest, decode_rgb(data, self.name)
        except UnusableImage as error:
            return digest or f"{UNREADABLE}{error.reason}", error

    def digest(self) -> str:
        """SHA-256 of the file, or `UNREADABLE` and the reason why it cannot be read."""
        try:
            return hashlib.sha256(self.content()).hexdigest()
        except UnusableImage as error:
            return f"{UNREADABLE}{error.reason}"


def iter_photos(source: Path | str) -> Iterator[Photo]:
    """The photos of a source, in a fixed order: by relative path, or by row.

    Raises:
        InputError: the source does not exist, or is Parquet that cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        count = 0
        for count, photo in enumerate(folder_photos(path), start=1):  # noqa: B007
            yield photo
        if not count:
            yield from _parquet_photos(find_parquet(path), path)
    elif path.suffix.lower() == ".parquet" and path.is_file():
        yield from _parquet_photos([path], path)
    elif path.exists():
        yield file_photo(path, shown(path.name))
    elif any(sign in str(source) for sign in "*?["):
        yield from _glob_photos(str(path))
    else:
        raise InputError("there is no such folder or file", where=shown(path), fix="name a folder of photos with --images")


def find_images(folder: Path) -> list[Path]:
    """The image files below a folder that can be tried, sorted by relative path. See the module for what an image is."""
    return [photo.path for photo in folder_photos(Path(folder)) if photo.path is not None and not _refusal(photo.path)]


def count_photos(source: Path | str) -> int:
    """How many photos `iter_photos` yields.

    Raises:
        InputError: as `iter_photos`.
    """
    return sum(1 for _ in iter_photos(source))


def photo_digests(source: Path | str) -> list[tuple[str, str]]:
    """Name and SHA-256 of every image of a photo source, in order. For an unreadable image, the reason replaces the digest.

    Raises:
        InputError: the source does not exist, or contains no image file.
    """
    return [(photo.name, digest) for photo, digest in digested_photos(source)]


def digested_photos(source: Path | str) -> list[tuple[Photo, str]]:
    """Every photo of a source with its `Photo.digest`, in order.

    Raises:
        InputError: the source does not exist, or contains no image file.
        StorageError: it is a damaged artifact.
    """
    require_whole(source)
    entries = [(photo, photo.digest()) for photo in iter_photos(source)]
    if not entries:
        raise InputError(
            "no images found",
            where=shown(Path(source)),
            fix="name a folder of images, such as .jpg, .png, .webp or .tif files",
        )
    return entries


def photo_source(source: Path | str) -> Source:
    """A photo source as stage input. Its digest covers the names and contents of its images, but not their location.

    Raises:
        InputError: the source does not exist, or contains no image file.
    """
    return Source(Path(source).expanduser(), source_digest(photo_digests(source)))


def source_digest(entries: Iterable[tuple[str, str]]) -> str:
    """The digest of a photo source with these names and digests of photos."""
    return digest_of(sorted(entries))


def shown(path: Path | str) -> str:
    """A path as text that can be printed and stored: bytes that are not UTF-8 are escaped."""
    text = path if isinstance(path, str) else path.as_posix()
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def _parquet_photos(files: list[Path], named: Path) -> Iterator[Photo]:
    return (Photo(picture.name, picture.load) for picture in parquet_pictures(files, named))


def _glob_photos(pattern: str) -> Iterator[Photo]:
    fixed = Path(pattern[: min(pattern.index(sign) for sign in "*?[" if sign in pattern)] or ".")
    root = fixed if fixed.is_dir() else fixed.parent
    results = RESULT_FOLDERS if is_home(root) else frozenset[str]()
    in_home = _Homes(root)
    for path in sorted(Path(name) for name in glob.glob(pattern, recursive=True)):
        if path.is_dir() or in_home.contain(path) or path.relative_to(root).parts[0] in results:
            continue
        if _is_photo(path):
            yield file_photo(path, shown(path))


def folder_photos(folder: Path) -> Iterator[Photo]:
    """What looks like a photo below a folder, usable or not, sorted by relative path. Parquet files are not read."""
    by_name = {path.relative_to(folder).as_posix(): photo for path, photo in _walk(folder)}
    return (by_name[name] for name in sorted(by_name))


def _walk(folder: Path) -> Iterator[tuple[Path, Photo]]:
    """Every photo below a folder, with its path. Folders come before links to folders, so that links never win."""
    results = RESULT_FOLDERS if is_home(folder) else frozenset[str]()
    in_home = _Homes(folder)
    waiting, links = [folder], list[Path]()
    seen: dict[tuple[int, int], Path] = {}
    while waiting or links:
        current = waiting.pop() if waiting else links.pop(0)
        try:
            info = current.stat()
            if seen.setdefault((info.st_dev, info.st_ino), current) != current:
                continue  # a link to a folder that has been read: its photos are there
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError as error:
            yield current, _refused(current, folder, f"unreadable: folder: {plain_reason(error)}")
            continue
        for entry in entries:
            path = current / entry.name
            if entry.name.startswith(".") or (current == folder and entry.name in results):
                continue
            if entry.is_symlink() and in_home.contain(path):
                continue
            if path.is_dir():
                if not is_home(path):
                    (links if entry.is_symlink() else waiting).append(path)
            elif _is_photo(path):
                yield path, file_photo(path, shown(path.relative_to(folder)))
        links.sort()


class _Homes:
    """The homes that links point into. A source inside a home may link to anything."""

    def __init__(self, folder: Path) -> None:
        self._known: dict[Path, bool] = {}
        self._source_in_home = is_home(folder) or self._below_home(folder.resolve())

    def contain(self, path: Path) -> bool:
        """Whether a path, or its link target, is a home or is inside one."""
        if self._source_in_home:
            return False
        target = path.resolve()
        return self._below_home(target) or (target.is_dir() and is_home(target))

    def _below_home(self, path: Path) -> bool:
        parent = path.parent
        if parent not in self._known:
            self._known[parent] = is_home(parent) or (parent != path and self._below_home(parent))
        return self._known[parent]


def _is_photo(path: Path) -> bool:
    """Whether a path that is not a folder counts as a photo, usable or not."""
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES or suffix in UNSUPPORTED_SUFFIXES:
        return True
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            return True
        if info.st_size < _HEAD_BYTES:
            return False
        with path.open("rb") as file:
            return _begins_like_an_image(file.read(_HEAD_BYTES))
    except OSError:
        return False


def _begins_like_an_image(head: bytes) -> bool:
    if head.startswith(_SIGNATURES):
        return True
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    brands = (b"avif", b"avis", *((b"heic", b"heix", b"mif1", b"msf1") if HEIF else ()))
    return head[4:8] == b"ftyp" and head[8:12] in brands


def _refusal(path: Path) -> str:
    """Why a file is not decoded; empty if it is."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "not a regular file"
    except FileNotFoundError:
        return "unreadable: broken link" if path.is_symlink() else ""
    except OSError as error:
        return f"unreadable: {plain_reason(error)}"
    suffix = path.suffix.lower()
    return f"unsupported: {suffix}" if suffix in UNSUPPORTED_SUFFIXES else ""


def file_photo(path: Path, name: str) -> Photo:
    """A file as a photo, whatever it is: reading it raises the reason if it is not one that is decoded."""
    reason = _refusal(path)
    return Photo(name, _Refusal(name, reason), path) if reason else Photo(name, path.read_bytes, path)


def _refused(path: Path, folder: Path, reason: str) -> Photo:
    name = shown(path.relative_to(folder))
    return Photo(name, _Refusal(name, reason))


@dataclass(frozen=True)
class _Refusal:
    """Raises the reason instead of returning bytes."""

    name: str
    reason: str

    def __call__(self) -> bytes:
        what = NOT_READABLE if self.reason.startswith("unreadable") else self.reason
        fix = f"repair or remove it ({self.reason})"
        if self.reason.split(": ")[-1] in _HEIF_SUFFIXES:
            fix = "pip install 'ddsr[heic]', or convert it to JPEG or PNG"
        elif self.reason.startswith("unsupported"):
            fix = "convert it to JPEG or PNG"
        raise UnusableImage(what, where=self.name, fix=fix, reason=self.reason)
