"""How the home folder of ddsr is recognized."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ddsr_core.storage.files import write_atomically

#: Marks a folder as a home. `ddsr gc` deletes nothing in a folder without it, and photos below it are never read.
HOME_MARKER = ".ddsr-home"
#: Folders in a home whose pictures ddsr has written. They are excluded if the home is the user's folder of photos.
RESULT_FOLDERS = frozenset({"artifacts", "runs", "nightly", "splits", "demo-photos", "prefect-results"})


#: Content of the marker.
MARK = json.dumps({"made_by": "ddsr", "format": 1}).encode()


def mark_home(home: Path) -> None:
    """Create a home, or mark one of an earlier version, if it is not marked yet."""
    marker = home / HOME_MARKER
    if not marker.is_file():
        write_atomically(marker, MARK)


def is_home(folder: Path) -> bool:
    """Whether a folder is a home: by its marker, or by the folders of a home that an earlier version made."""
    if (folder / HOME_MARKER).is_file():
        return True
    return _has_manifests(folder / "artifacts")


def _has_manifests(artifacts: Path) -> bool:
    """Whether a folder looks like the artifacts of ddsr: ``<stage>/<32 hex digits>/manifest.json``."""
    try:
        stages = [entry for entry in os.scandir(artifacts) if entry.is_dir(follow_symlinks=False)]
        return any(
            (Path(key.path) / "manifest.json").is_file()
            for stage in stages
            for key in os.scandir(stage.path)
            if len(key.name) == 32 and key.is_dir(follow_symlinks=False)
        )
    except OSError:
        return False
