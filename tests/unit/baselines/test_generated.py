"""Which folders count as generated training sets."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ddsr_core.baselines.generated import require_generated
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.imaging.image_sets import finish_image_set, image_set_name
from ddsr_core.imaging.images import save_png

SAMPLED = {"pseudo_label": 0, "psnr_bic": 20.0, "nearest_patch_id": "a"}
INVERTED = {"pseudo_label": 0, "psnr_bic": 20.0}
CROPPED = {"photo": "a.jpg", "y": 0, "x": 0, "psnr_bic": 20.0}
TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64()}


def image_set(folder: Path, row: dict) -> Path:
    save_png(folder / image_set_name(0), np.zeros((8, 8, 3), np.uint8))
    finish_image_set(folder, [row], {name: TYPES[type(value)] for name, value in row.items()})
    return folder


@pytest.mark.parametrize(("kind", "row"), [("distilled", SAMPLED), ("base", SAMPLED), ("gsdd", INVERTED)])
def test_a_set_of_the_kind_is_accepted_as_folder_and_as_parquet(tmp_path: Path, kind: str, row: dict):
    folder = image_set(tmp_path / "set", row)
    require_generated(kind, folder)
    require_generated(kind, folder / "images.parquet")


@pytest.mark.parametrize(
    ("kind", "row"),
    [("distilled", INVERTED), ("base", CROPPED), ("gsdd", SAMPLED), ("gsdd", CROPPED), ("distilled", CROPPED)],
)
def test_a_set_of_another_kind_is_an_error_that_says_what_to_give(tmp_path: Path, kind: str, row: dict):
    folder = image_set(tmp_path / "set", row)
    with pytest.raises(InputError, match=f"not a {kind} set") as caught:
        require_generated(kind, folder)
    assert "--training-set full" in str(caught.value)
    with pytest.raises(InputError, match=f"not a {kind} set"):
        require_generated(kind, folder / "images.parquet")


def test_photos_and_damaged_metadata_are_no_generated_set(tmp_path: Path):
    save_png(tmp_path / "photos/a.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(InputError, match="not a distilled set"):
        require_generated("distilled", tmp_path / "photos")
    (tmp_path / "photos/metadata.jsonl").write_text("not json\n")
    with pytest.raises(InputError, match="not a distilled set"):
        require_generated("distilled", tmp_path / "photos")
    (tmp_path / "photos/metadata.jsonl").write_text(json.dumps([1]) + "\n")
    with pytest.raises(InputError, match="not a distilled set"):
        require_generated("distilled", tmp_path / "photos")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="not a gsdd set"):
        require_generated("gsdd", tmp_path / "broken.parquet")


@pytest.mark.parametrize("kind", ["random", "full", "nonsense"])
def test_a_kind_that_is_not_generated_is_an_error(tmp_path: Path, kind: str):
    with pytest.raises(ConfigError, match="not a generated training set"):
        require_generated(kind, tmp_path)
