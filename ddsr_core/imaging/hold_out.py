"""Held-out test photos for a user who names none: a fixed share, chosen by content, never seen in training."""

from __future__ import annotations

import os
from pathlib import Path

from ddsr_core.config import digest_of
from ddsr_core.errors import ConfigError
from ddsr_core.imaging.photos import find_images, photo_digests
from ddsr_core.storage.files import storage_errors
from ddsr_core.storage.stage import Source

TEST_SHARE = 10


def hold_out(photos: Path, home: Path) -> tuple[Source, Source]:
    """Split a folder of photos into folders of links below ``home/splits``: one photo in ten (at least one) is for testing.

    The choice depends on the photos' content alone; copies of a photo land on the same side. Each photo is read once.

    Returns:
        ``(train, test)``.

    Raises:
        ConfigError: not a folder, or fewer than two different photos.
    """
    photos = Path(photos).expanduser()
    if not photos.is_dir() or not find_images(photos):
        raise ConfigError(
            "only a folder of image files can be split into training and test photos", where=photos,
            fix="name test photos with --test, or stop after sampling with --set 'sr.archs=[]'",
        )  # fmt: skip
    digests = photo_digests(photos)
    contents = sorted({digest for _, digest in digests})
    if len(contents) < 2:
        raise ConfigError(
            "a single photo cannot be both training and test data", where=photos,
            fix="add photos, name test photos with --test, or stop after sampling with --set 'sr.archs=[]'",
        )  # fmt: skip
    held = set(contents[: max(1, len(contents) // TEST_SHARE)])
    root = home / "splits" / digest_of(sorted(digests))[:32]
    sides = {side: [pair for pair in digests if (pair[1] in held) == (side == "test")] for side in ("train", "test")}
    with storage_errors(home):
        for side, pairs in sides.items():
            for name, _ in pairs:
                _link(root / side / name, photos / name)
    train, test = (Source(root / side, digest_of(sorted(pairs))) for side, pairs in sides.items())
    return train, test


def _link(link: Path, photo: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.unlink(missing_ok=True)
        os.symlink(photo.resolve(), link)
