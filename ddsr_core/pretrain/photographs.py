"""The photographs that `ddsr-tiny` was trained on: 28 photos from Debian's wallpaper packages.

``wallpapers.csv`` names package, path inside it, subject and SHA-256 of each; renderings and drawings of the same
packages are left out. The packages are free by Debian's guidelines (CC BY, CC BY-SA, CC0, GPL-2+).
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import tempfile
from pathlib import Path

from ddsr_core.errors import InputError
from ddsr_core.progress import ProgressFactory, silent
from ddsr_core.storage.store import sha256_of

LIST = Path(__file__).with_name("wallpapers.csv")


def listed_photos() -> list[dict[str, str]]:
    """Rows of ``wallpapers.csv``: package, path, category, sha256."""
    with LIST.open(newline="") as file:
        return list(csv.DictReader(file))


def file_name(path: str) -> str:
    """A flat name for a photo; KDE keeps each wallpaper as ``<name>/contents/images/<size>.jpg``."""
    parts = Path(path).parts
    return parts[parts.index("wallpapers") + 1] + ".jpg" if "wallpapers" in parts else parts[-1]


def fetch_wallpapers(folder: Path, progress: ProgressFactory = silent) -> Path:
    """Download the packages (about 170 MB) with apt, unpack them aside and copy the listed photos into ``folder``.

    Photos that are there already, with the right digest, are kept.

    Raises:
        InputError: no apt on this machine, a package cannot be had, or a photo differs from the list.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [row for row in listed_photos() if not _is_there(folder / file_name(row["path"]), row["sha256"])]
    packages = sorted({row["package"] for row in missing})
    with (
        tempfile.TemporaryDirectory() as scratch,
        progress("Fetching photos", total=len(packages), unit="packages") as bar,
    ):
        for package in packages:
            _unpack(package, Path(scratch))
            for row in (row for row in missing if row["package"] == package):
                source, target = Path(scratch) / row["path"].lstrip("/"), folder / file_name(row["path"])
                if not _is_there(source, row["sha256"]):
                    raise InputError(
                        "a photo of the package is not the one in the list", where=f"{package}: {row['path']}",
                        mend="the package has changed: use Debian 12's, or train on photos of your own with --photos",
                    )  # fmt: skip
                shutil.copyfile(source, target)
            bar.advance()
    return folder


def _is_there(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


def _unpack(package: str, folder: Path) -> None:
    """Download one Debian package into ``folder`` and unpack it there."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise InputError(
            "the wallpaper packages come through apt-get and dpkg-deb, which are not on this machine",
            mend="run on Debian or a relative of it, or train on photos of your own with --photos",
        )
    for command in (["apt-get", "download", package], ["dpkg-deb", "-x", f"{package}_*.deb", "."]):
        arguments = [str(match) for part in command for match in (sorted(folder.glob(part)) if "*" in part else [part])]
        done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(
                f"`{' '.join(command)}` failed: {done.stderr.strip()}",
                mend="run `apt-get update` and try again",
            )
