"""Parquet files with images, and image sets as ``datasets`` opens them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddsr_core.errors import InputError
from ddsr_core.imaging.image_sets import finish_image_set, image_set_name, read_image_parquet, read_image_set
from ddsr_core.imaging.images import save_png

COLORS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def test_parquet_without_images_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="no column `image`"):
        list(read_image_parquet(tmp_path / "x.parquet"))
    (tmp_path / "y.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(InputError, match="not a readable Parquet"):
        list(read_image_parquet(tmp_path / "y.parquet"))


def test_image_sets_open_as_imagefolder_and_declare_their_image_feature(tmp_path: Path) -> None:
    for index in range(2):
        save_png(tmp_path / image_set_name(index), COLORS)
    finish_image_set(tmp_path, [{"label": 3}, {"label": 4}], {"label": pa.int32()})
    assert read_image_set(tmp_path)[1] == {"file_name": "images/000001.png", "label": 4}
    schema = pq.read_schema(tmp_path / "images.parquet")
    assert json.loads(schema.metadata[b"huggingface"])["info"]["features"]["image"] == {"_type": "Image"}
