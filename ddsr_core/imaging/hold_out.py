"""Training and test photos that have no picture in common: named by the user, or held out of one source.

Pictures are compared by the content of their files, so that copies under other names are found. A split is a pair of folders
of links below ``home/splits``; pictures in Parquet files are copied there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ddsr_core.config import digest_of
from ddsr_core.errors import ConfigError
from ddsr_core.imaging.decode import UnusableImage
from ddsr_core.imaging.photos import IMAGE_SUFFIXES, UNREADABLE, Photo, digested_photos, shown, source_digest
from ddsr_core.storage.files import storage_errors, write_atomically
from ddsr_core.storage.stage import Source

TEST_SHARE = 10
#: A held-out photo must have sides of at least this many pixels, or metrics could not be computed on it.
MIN_TEST_PX = 32
_FIX = "add photos, name test photos with --test, or stop after sampling with --set 'sr.archs=[]'"

#: A photo or its name.
_Named = TypeVar("_Named")
#: Names and digests of photos, as of `ddsr_core.imaging.photos.photo_digests`.
PhotoDigests = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Separated:
    """Training and test photos without a common picture.

    Attributes:
        train: without the photos that are also test photos.
        test: unchanged.
        left_out: names of the training photos that were left out.
        photos: the remaining training photos, by the names that they have in the source that the user named.
        tests: the test photos, likewise.
    """

    train: Source
    test: Source
    left_out: tuple[str, ...]
    photos: PhotoDigests
    tests: PhotoDigests


def keep_apart(photos: Path | str, tests: Path | str, home: Path) -> Separated:
    """Leave every test photo out of the training photos. Each photo is read once.

    Args:
        photos: training photos, any photo source.
        tests: test photos, any photo source.
        home: its folder ``splits`` receives links to the remaining training photos, if some are left out.

    Raises:
        ConfigError: no training photo remains.
        InputError: one of the sources does not exist or contains no image file.
        StorageError: the home cannot be written.
    """
    test_entries, entries = digested_photos(tests), digested_photos(photos)
    test = _source(tests, test_entries)
    remaining, common = without_tests(entries, [digest for _, digest in test_entries], photos)
    train = _source(photos, entries)
    if common:
        root = home / "splits" / digest_of(["apart", sorted({digest for _, digest in common}), train.digest])[:32]
        with storage_errors(home):
            train = _place(Path(photos), root / "train", remaining)
    return Separated(train, test, tuple(photo.name for photo, _ in common), _named(remaining), _named(test_entries))


def without_tests(
    photos: Iterable[tuple[_Named, str]], tests: Iterable[str], where: Path | str
) -> tuple[list[tuple[_Named, str]], list[tuple[_Named, str]]]:
    """Training photos that are not test photos, and those that are.

    Args:
        photos: training photos or their names, with digests.
        tests: digests of the test photos.
        where: the training photos come from, for the error.

    Raises:
        ConfigError: all training photos that can be read are test photos.
    """
    tested = {digest for digest in tests if not digest.startswith(UNREADABLE)}
    photos = list(photos)
    remaining = [pair for pair in photos if pair[1] not in tested]
    common = [pair for pair in photos if pair[1] in tested]
    if common and all(digest.startswith(UNREADABLE) for _, digest in remaining):
        raise ConfigError(
            f"all {len(common)} training photos are test photos",
            where=where,
            fix="name other test photos, or none: then one photo in ten is held out",
        )
    return remaining, common


def left_out_text(count: int) -> str:
    """What a user is told about training photos that are also test photos.

    >>> left_out_text(2)
    '2 training photos are also test photos and are left out of training'
    """
    if count == 1:
        return "1 training photo is also a test photo and is left out of training"
    return f"{count:,} training photos are also test photos and are left out of training"


def hold_out(photos: Path | str, home: Path) -> tuple[Source, Source]:
    """Split a photo source in two: one photo in ten, at least one, is for testing. Each photo is read once.

    The test photos are the first ones, in order of their digests, that can be decoded. The choice depends on the content of
    photos alone, and does not change when a photo on the training side is damaged. Copies of a photo are on the same side.

    Args:
        photos: any photo source.
        home: its folder ``splits`` receives links to the photos.

    Returns:
        ``(train, test)``.

    Raises:
        ConfigError: fewer than two different photos, or none that can be tested on.
        InputError: the source does not exist or contains no image file.
        StorageError: the home cannot be written.
    """
    entries = digested_photos(photos)
    by_content: dict[str, Photo] = {}
    for photo, digest in entries:
        by_content.setdefault(photo.name if digest.startswith(UNREADABLE) else digest, photo)
    if len(by_content) < 2:
        raise ConfigError("a single photo cannot be both training and test data", where=photos, fix=_FIX)
    readable = sorted({digest for _, digest in entries if not digest.startswith(UNREADABLE)})
    held = _testable((by_content[digest] for digest in readable), max(1, len(by_content) // TEST_SHARE))
    if not held:
        raise ConfigError(f"no photo of at least {MIN_TEST_PX} px can be tested on", where=photos, fix=_FIX)
    names = {photo.name for photo in held}
    tested = {digest for photo, digest in entries if photo.name in names}
    root = home / "splits" / _source(photos, entries).digest[:32]
    with storage_errors(home):
        train = _place(Path(photos), root / "train", [pair for pair in entries if pair[1] not in tested])
        test = _place(Path(photos), root / "test", [pair for pair in entries if pair[1] in tested])
    return train, test


def _named(entries: Iterable[tuple[Photo, str]]) -> PhotoDigests:
    return tuple((photo.name, digest) for photo, digest in entries)


def _source(source: Path | str, entries: list[tuple[Photo, str]]) -> Source:
    return Source(Path(source).expanduser(), source_digest(_named(entries)))


def _testable(candidates: Iterable[Photo], count: int) -> list[Photo]:
    """The first photos that can be decoded and are large enough, at most ``count``."""
    chosen: list[Photo] = []
    for photo in candidates:
        if len(chosen) == count:
            break
        try:
            if min(photo.read().shape[:2]) >= MIN_TEST_PX:
                chosen.append(photo)
        except UnusableImage:  # it stays on the training side, where it is counted with its reason
            continue
    return chosen


def _place(source: Path, folder: Path, entries: list[tuple[Photo, str]]) -> Source:
    """A folder of links to these photos, or of copies of rows of Parquet files, as a photo source."""
    placed: list[tuple[str, str]] = []
    for number, (photo, digest) in enumerate(entries):
        name = _name(photo, source.expanduser(), number)
        if photo.path is not None:
            _link(folder / name, photo.path)
        elif not digest.startswith(UNREADABLE):
            write_atomically(folder / name, photo.load())
        else:
            continue
        placed.append((shown(name), digest))
    return Source(folder, source_digest(placed))


def _name(photo: Photo, source: Path, number: int) -> str:
    """Path of a photo in the folder of links: the same as below its source, or else a number."""
    if photo.path is None:
        suffix = Path(photo.name).suffix.lower()
        return f"{number:08d}{suffix if suffix in IMAGE_SUFFIXES else '.png'}"
    if photo.path.is_relative_to(source) and photo.path != source:
        return photo.path.relative_to(source).as_posix()
    return f"{number:08d}-{photo.path.name}"


def _link(link: Path, photo: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    target = photo.resolve()
    if link.is_symlink() and Path(os.readlink(link)) != target:
        link.unlink(missing_ok=True)
    if not link.is_symlink():
        with suppress(FileExistsError):  # another run has just made it
            os.symlink(target, link)
