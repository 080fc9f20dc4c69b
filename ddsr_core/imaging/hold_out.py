"""Held-out test photos for users who name none: a fixed share, chosen by content, that training never sees."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ddsr_core.errors import ConfigError
from ddsr_core.imaging.photos import find_images, photo_source
from ddsr_core.storage.files import storage_errors

TEST_SHARE = 10


def hold_out(photos: Path, home: Path) -> tuple[Path, Path]:
    """Split a folder of photos into folders of links below ``home/splits``: one photo in ten (at least one) is for testing.

    The choice depends on the photos' content alone; copies of a photo land on the same side.

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
    digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in find_images(photos)}
    contents = sorted(set(digests.values()))
    if len(contents) < 2:
        raise ConfigError(
            "a single photo cannot be both training and test data", where=photos,
            fix="add photos, name test photos with --test, or stop after sampling with --set 'sr.archs=[]'",
        )  # fmt: skip
    held = set(contents[: max(1, len(contents) // TEST_SHARE)])
    root = home / "splits" / photo_source(photos).digest[:32]
    with storage_errors(home):
        for path, digest in digests.items():
            link = root / ("test" if digest in held else "train") / path.relative_to(photos)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.unlink(missing_ok=True)
                os.symlink(path.resolve(), link)
    return root / "train", root / "test"
