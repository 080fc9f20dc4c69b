"""The photographs that `ddsr-tiny` is trained on: photos and photo textures from Debian packages.

``photographs.csv`` names package, path inside it (``archive!path`` for a file of a zip archive), subject, license and
SHA-256 of each. Renderings, drawings, logos, normal maps and near-duplicates of the same packages are left out.
"""

from __future__ import annotations

import csv
import hashlib
import re
import shutil
import subprocess
import tempfile
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path

from ddsr_core.errors import InputError
from ddsr_core.imaging.decode import decode_rgb
from ddsr_core.imaging.images import encode_png
from ddsr_core.imaging.photos import IMAGE_SUFFIXES
from ddsr_core.progress import ProgressFactory, silent
from ddsr_core.storage.files import sha256_of, write_atomically

LIST = Path(__file__).with_name("photographs.csv")
#: Between the path of an archive in the package and the path of a file in the archive.
INSIDE = "!"
#: Pillow's names of the formats of game textures, which other stages do not read. Each file's digest is checked first.
CONVERTED_FORMATS = ("DDS",)


def listed_photos() -> list[dict[str, str]]:
    """Rows of ``photographs.csv``: package, path, category, license, sha256."""
    with LIST.open(newline="") as file:
        return list(csv.DictReader(file))


def file_name(row: dict[str, str]) -> str:
    """A flat name for a photo that no other row has: package, the first digits of its digest, suffix.

    Formats of game textures, which other stages do not read, become PNG.
    """
    suffix = Path(row["path"]).suffix.lower()
    return f"{row['package']}-{row['sha256'][:12]}{suffix if suffix in IMAGE_SUFFIXES else '.png'}"


def fetch_photographs(folder: Path, progress: ProgressFactory = silent) -> Path:
    """Download the packages with apt, one at a time, and copy the listed photos into ``folder``.

    Existing photos with the right digest are kept, and packages without missing photos are not downloaded, so that a
    repeated call continues after a failure. Files that are not in the list are removed, so that a
    folder of an older list does not change the training data.

    Raises:
        InputError: there is no apt on this machine, a package cannot be downloaded, or a photo or its license differs from
            the list.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = listed_photos()
    _remove_unlisted(folder, {file_name(row) for row in rows})
    missing = [row for row in rows if not _is_fetched(folder, row)]
    packages = sorted({row["package"] for row in missing})
    with progress("Fetching photos", total=len(packages), unit="packages") as bar:
        for package in packages:
            bar.note(package)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                unpack(package, Path(scratch))
                for row in (row for row in missing if row["package"] == package):
                    check_license(Path(scratch), row)
                    data = read_photo(Path(scratch), row)
                    write_atomically(folder / file_name(row), _as_png(data, row) if _is_converted(row) else data)
            bar.advance()
    return folder


def read_photo(root: Path, row: dict[str, str]) -> bytes:
    """The bytes of a listed photo of a package that is unpacked at ``root``.

    Raises:
        InputError: it is not there, or is not the one in the list.
    """
    outer, _, inner = row["path"].lstrip("/").partition(INSIDE)
    try:
        if inner:
            with zipfile.ZipFile(root / outer) as archive:
                data = archive.read(inner)
        else:
            data = (root / outer).read_bytes()
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise _changed(row, f"a photo of the package cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise _changed(row, "a photo of the package is not the one in the list")
    return data


def check_license(root: Path, row: dict[str, str]) -> None:
    """Compare the listed license of a photo with what the package that is unpacked at ``root`` says.

    Raises:
        InputError: they differ.
    """
    text = root / "usr/share/doc" / row["package"] / "copyright"
    stated = license_in(text.read_text(errors="replace"), row["path"]) if text.is_file() else None
    if stated != row["license"]:
        raise _changed(row, f"the package states the license {stated} for a photo that is listed with {row['license']}")


def _changed(row: dict[str, str], what: str) -> InputError:
    return InputError(
        what,
        where=f"{row['package']}: {row['path']}",
        fix="the package has changed: use the packages of Debian 12, or train on photos of your own with --photos",
    )


def _is_converted(row: dict[str, str]) -> bool:
    return Path(row["path"]).suffix.lower() not in IMAGE_SUFFIXES


def _as_png(data: bytes, row: dict[str, str]) -> bytes:
    return encode_png(decode_rgb(data, row["path"], formats=CONVERTED_FORMATS))


def _is_fetched(folder: Path, row: dict[str, str]) -> bool:
    """Whether a photo is present and intact. Converted photos were checked before they were written atomically."""
    path = folder / file_name(row)
    return path.is_file() and (_is_converted(row) or sha256_of(path) == row["sha256"])


def _remove_unlisted(folder: Path, names: set[str]) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)  # what a run that was killed had unpacked
        elif path.name not in names:
            path.unlink()


def unpack(package: str, folder: Path) -> None:
    """Download one Debian package into ``folder`` and unpack it there.

    Raises:
        InputError: no apt on this machine, or the package cannot be downloaded or unpacked.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise InputError(
            "the photographs come from Debian packages, which require apt-get and dpkg-deb; these are not on this machine",
            where=package,
            fix="run on Debian or a relative of it, or train on photos of your own with --photos",
        )
    _call(["apt-get", "download", package], folder, package)
    archive = next(iter(folder.glob("*.deb")))
    _call(["dpkg-deb", "-x", archive.name, "."], folder, package)
    archive.unlink()


def _call(command: list[str], folder: Path, package: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(
            f"`{' '.join(command)}` failed: {done.stderr.strip()}",
            where=f"package {package}",
            fix="run `apt-get update`, check network and disk space, and run again: finished packages are kept",
        )


def license_in(copyright_text: str, path: str) -> str | None:
    """The license that a package's ``debian/copyright`` states for a file; None if it names none.

    Of the stanzas of a machine-readable file the last that matches holds; its patterns are those of the source
    package, so they are tried against every tail of the path. A file in another format applies to the entire package.
    """
    if "Format:" not in copyright_text[:2000]:
        found = re.search(
            r"GNU General Public License.{0,200}?version (\d).{0,80}?(any later version)?", copyright_text, re.S
        )
        return f"GPL-{found[1]}+" if found else None
    stanzas = [fields for text in re.split(r"\n\s*\n", copyright_text) if "Files" in (fields := _fields(text))]
    named = [each for each in stanzas if any(_matches(path, pattern) for pattern in each["Files"].split())]
    if not named:  # a source package may keep its files in other folders than those they are installed to
        named = [each for each in stanzas if Path(path).name in {Path(name).name for name in each["Files"].split()}]
    return named[-1].get("License", "").splitlines()[0].strip() if named else None


def _fields(stanza: str) -> dict[str, str]:
    """Fields of one stanza; further lines of a field begin with a space."""
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line[:1].isspace() and name:
            fields[name] += "\n" + line
        elif ":" in line:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    return fields


def _matches(path: str, pattern: str) -> bool:
    if pattern == "*":
        return True
    names = {re.sub(r"/[^/]*" + INSIDE, "/", path), path.replace(INSIDE, "/")}  # with and without the archive's own name
    for name in names:
        parts = Path(name.lstrip("/")).parts
        if any(fnmatchcase("/".join(parts[start:]), pattern) for start in range(len(parts))):
            return True
    return False
