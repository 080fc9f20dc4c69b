"""Parquet files as others write them: read, or refused with one message; a row without a picture is a skip."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddsr_core.errors import InputError
from ddsr_core.imaging import parquet_photos
from ddsr_core.imaging.decode import UnusableImage
from ddsr_core.imaging.images import encode_png, save_png
from ddsr_core.imaging.photos import iter_photos, photo_source

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 12, 20, 3), dtype=np.uint8)
DATA = [encode_png(image) for image in IMAGES]
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def write(path: Path, column: Any, name: str = "image", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"number": list(range(len(column))), name: column}), path, **options)
    return path


def check(source: Path) -> list[str]:
    """All eight images come back; their names."""
    photos = list(iter_photos(source))
    for photo, image in zip(photos, IMAGES, strict=True):
        np.testing.assert_array_equal(photo.read(), image)
    return [photo.name for photo in photos]


def test_structs_in_any_order_and_of_large_types(tmp_path: Path) -> None:
    turned = pa.struct({"path": pa.string(), "bytes": pa.binary()})
    rows = [{"bytes": data, "path": f"{n}.png"} for n, data in enumerate(DATA)]
    assert check(write(tmp_path / "turned.parquet", pa.array(rows, turned))) == [f"{n}.png" for n in range(8)]
    large = pa.struct({"bytes": pa.large_binary(), "path": pa.large_string()})
    assert check(write(tmp_path / "large.parquet", pa.array(rows, large)))[3] == "3.png"
    same = [{"bytes": data, "path": "image.png"} for data in DATA]
    assert len(set(check(write(tmp_path / "same.parquet", pa.array(same, STRUCT))))) == 8
    no_path = pa.array([{"bytes": data} for data in DATA], pa.struct({"bytes": pa.binary()}))
    assert check(write(tmp_path / "no-path.parquet", no_path))[1] == "row-00000001"


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("name", ["image", "jpg", "img"])
def test_plain_bytes(tmp_path: Path, kind: pa.DataType, name: str) -> None:
    assert check(write(tmp_path / "set.parquet", pa.array(DATA, kind), name))[0] == "row-00000000"


def test_the_column_that_datasets_declares(tmp_path: Path) -> None:
    features = {"view": {"_type": "Image"}, "number": {"dtype": "int64", "_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"view": pa.array([{"bytes": d, "path": None} for d in DATA], STRUCT)}).replace_schema_metadata(
        metadata
    )
    pq.write_table(table, tmp_path / "set.parquet")
    check(tmp_path / "set.parquet")


def test_paths_relative_to_the_file_and_absolute(tmp_path: Path) -> None:
    for number, image in enumerate(IMAGES):
        save_png(tmp_path / f"files/{number}.png", image)
    rows = [{"bytes": None, "path": f"files/{n}.png" if n % 2 else str(tmp_path / f"files/{n}.png")} for n in range(8)]
    check(write(tmp_path / "paths.parquet", pa.array(rows, STRUCT)))
    check(write(tmp_path / "text.parquet", pa.array([row["path"] for row in rows])))
    (tmp_path / "files/3.png").unlink()
    with pytest.raises(UnusableImage, match="cannot be read"):
        list(iter_photos(tmp_path / "paths.parquet"))[3].read()


def test_a_row_without_a_picture_is_one_that_cannot_be_used(tmp_path: Path) -> None:
    rows = [{"bytes": data, "path": f"{n}.png"} for n, data in enumerate(DATA)]
    photos = list(iter_photos(write(tmp_path / "null.parquet", pa.array([*rows[:4], None, *rows[4:]], STRUCT))))
    assert len(photos) == 9
    with pytest.raises(UnusableImage, match="no picture in this row"):
        photos[4].read()
    np.testing.assert_array_equal(photos[8].read(), IMAGES[7])
    assert len(photo_source(tmp_path / "null.parquet").digest) == 64


def test_addresses_and_other_columns_are_refused_with_one_message(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="addresses, not pictures"):
        list(iter_photos(write(tmp_path / "urls.parquet", [f"https://example.org/{n}.jpg" for n in range(8)])))
    with pytest.raises(InputError, match="not pictures"):
        list(iter_photos(write(tmp_path / "floats.parquet", [[0.5, 0.5]] * 8)))
    with pytest.raises(InputError, match="no column `image`"):
        list(iter_photos(write(tmp_path / "other.parquet", [1] * 8, "label")))


def test_the_layout_of_the_hub_is_found_below_a_folder(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    write(tmp_path / "data/train-00000-of-00002.parquet", pa.array(DATA[:5], pa.binary()))
    write(tmp_path / "data/train-00001-of-00002.parquet", pa.array(DATA[5:], pa.binary()))
    write(tmp_path / ".cache/x.parquet", pa.array(DATA, pa.binary()))
    check(tmp_path)


def test_pictures_may_be_asked_for_in_any_order_and_by_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_photos, "BATCH_BYTES", 2 * len(DATA[0]))
    monkeypatch.setattr(parquet_photos, "RECENT_ROWS", 3)
    photos = list(iter_photos(write(tmp_path / "set.parquet", pa.array(DATA, pa.binary()), row_group_size=3)))
    order = np.random.default_rng(1).permutation(np.repeat(np.arange(8), 5))
    with ThreadPoolExecutor(4) as pool:
        for number, data in zip(order, pool.map(lambda n: photos[n].load(), order), strict=True):
            assert data == DATA[number]


def test_damage_in_the_middle_is_a_reason(tmp_path: Path) -> None:
    path = write(
        tmp_path / "set.parquet", pa.array(DATA, pa.binary()), row_group_size=2, compression="zstd", use_dictionary=False
    )
    data = bytearray(path.read_bytes())
    offset = pq.read_metadata(path).row_group(2).column(1).data_page_offset
    data[offset : offset + 60] = bytes(60)
    path.write_bytes(data)
    photos = list(iter_photos(path))
    assert photos[1].load() == DATA[1]
    with pytest.raises(UnusableImage, match="Parquet file is damaged"):
        photos[4].read()
    assert photos[7].load() == DATA[7]


def test_only_few_pictures_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_photos, "RECENT_BYTES", 3 * len(DATA[0]))
    photos = list(iter_photos(write(tmp_path / "set.parquet", pa.array(DATA * 20, pa.binary()))))
    for photo in photos:
        photo.load()
    reader = photos[0].load.args[0]  # type: ignore[attr-defined]
    assert len(reader._recent) <= 3
