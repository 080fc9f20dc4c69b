"""Photo sources that a user can name: a folder, an image file, a glob pattern, or Parquet files with an image column."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ddsr_core.config import digest_of
from ddsr_core.errors import InputError
from ddsr_core.imaging.decode import decode_rgb
from ddsr_core.imaging.image_sets import read_image_parquet
from ddsr_core.storage.stage import Source

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
#: Stands in place of the digest of an image that cannot be read, before the reason.
UNREADABLE = "unreadable: "


def find_images(folder: Path) -> list[Path]:
    """Every image file below ``folder``, by suffix and without hidden files and folders, sorted by relative path."""
    folder = Path(folder)
    paths = (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    visible = (p for p in paths if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    return sorted(visible, key=lambda p: p.relative_to(folder).as_posix())


@dataclass(frozen=True)
class Photo:
    """One image of a source, not yet read.

    Attributes:
        name: path relative to the source, or the path in a row of a Parquet file.
        load: returns the bytes of the file; raises OSError if it cannot be read.
    """

    name: str
    load: Callable[[], bytes]

    def read(self) -> np.ndarray:
        """Decode the image to ``uint8 (H, W, 3)``.

        Raises:
            InputError: the file cannot be read or decoded.
        """
        try:
            data = self.load()
        except OSError as error:
            raise InputError("cannot be read", where=self.name, fix=str(error)) from error
        return decode_rgb(data, self.name)


def iter_photos(source: Path | str) -> Iterator[Photo]:
    """The photos of a folder, a single image, a glob pattern, or Parquet (file or folder) with an image column.

    The order is fixed: by relative path, or by row.

    Raises:
        InputError: the source does not exist.
    """
    path = Path(source).expanduser()
    if any(sign in str(source) for sign in "*?[") and not path.exists():
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        yield from (Photo(p.as_posix(), p.read_bytes) for p in files if p.suffix.lower() in IMAGE_SUFFIXES)
    elif path.is_dir():
        images = find_images(path)
        yield from (Photo(p.relative_to(path).as_posix(), p.read_bytes) for p in images)
        if not images:
            yield from _parquet_photos(path)
    elif path.suffix == ".parquet" and path.is_file():
        yield from _parquet_photos(path)
    elif path.is_file():
        yield Photo(path.name, path.read_bytes)
    else:
        raise InputError("there is no such folder or file", where=path, fix="name a folder of photos with --images")


def _parquet_photos(path: Path) -> Iterator[Photo]:
    for index, row in enumerate(read_image_parquet(path)):
        name = row["image"].get("path") or f"row-{index:08d}"
        data: bytes = row["image"]["bytes"]
        yield Photo(str(name), partial(bytes, data))


def photo_digests(source: Path | str) -> list[tuple[str, str]]:
    """Name and SHA-256 of every image of a photo source, in order. For an unreadable image, the reason replaces the digest.

    Raises:
        InputError: the source does not exist, or contains no image file.
    """
    entries = []
    for photo in iter_photos(source):
        try:
            entries.append((photo.name, hashlib.sha256(photo.load()).hexdigest()))
        except OSError as error:  # part of the input: the stage counts the image as skipped
            entries.append((photo.name, f"{UNREADABLE}{error.strerror}"))
    if not entries:
        raise InputError(
            "no images found",
            where=Path(source),
            fix=f"name a folder with {', '.join(sorted(IMAGE_SUFFIXES))} files",
        )
    return entries


def photo_source(source: Path | str) -> Source:
    """A photo source as stage input. Its digest covers names and contents of its images, but not where they lie.

    Raises:
        InputError: the source does not exist, or contains no image file.
    """
    return Source(Path(source).expanduser(), digest_of(sorted(photo_digests(source))))
