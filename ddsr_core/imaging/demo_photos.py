"""The demo's photographs, which come with the packages scikit-image and scikit-learn. They are not part of this project.

Graphics, microscopy, astronomy and second views of a scene are left out. One photo is held out as the test set.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ddsr_core.errors import InputError
from ddsr_core.storage.files import write_atomically

TRAIN = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/motorcycle_left.png"),
    ("sklearn", "datasets/images/flower.jpg"),
)
TEST = (("sklearn", "datasets/images/china.jpg"),)


def write_demo_photos(folder: Path) -> tuple[Path, Path]:
    """Copy the photos to ``folder/train`` and ``folder/test``.

    Returns:
        Both folders.

    Raises:
        InputError: a package does not contain its photo.
    """
    for name, photos in (("train", TRAIN), ("test", TEST)):
        for package, path in photos:
            target = folder / name / Path(path).name
            data = _photo(package, path).read_bytes()
            if not target.exists() or target.read_bytes() != data:
                write_atomically(target, data)
    return folder / "train", folder / "test"


def _photo(package: str, path: str) -> Path:
    spec = importlib.util.find_spec(package)  # finds the folder without importing the package
    for root in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(root) / path).is_file():
            return Path(root) / path
    raise InputError(
        f"the package {package} does not contain {path}",
        fix="run `make setup`, or give your own photos with --images",
    )
