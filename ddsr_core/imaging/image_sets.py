"""Images in Parquet files that Hugging Face ``datasets`` shows as pictures, and image sets as ``ddsr`` writes them.

An image set is a folder with ``images/*.png``, ``metadata.jsonl`` (the layout *imagefolder*) and ``images.parquet``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ddsr_core.errors import InputError
from ddsr_core.storage.files import write_atomically, writing_atomically

#: Rows of a Parquet file that are written as one group, and are in memory at once.
ROWS_PER_GROUP = 256
#: Names of Arrow types in the metadata of ``datasets``.
_FEATURE_TYPES = {
    "string": "string",
    "int32": "int32",
    "int64": "int64",
    "float": "float32",
    "double": "float64",
    "bool": "bool",
}


def image_schema(fields: Mapping[str, pa.DataType]) -> pa.Schema:
    """Arrow schema with an ``image`` struct that Hugging Face ``datasets`` shows as pictures, followed by ``fields``."""
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    for name, kind in fields.items():
        features[name] = {"dtype": _FEATURE_TYPES[str(kind)], "_type": "Value"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([("image", struct), *fields.items()], metadata=metadata)


def write_image_parquet(path: Path, rows: Iterable[Mapping[str, Any]], fields: Mapping[str, pa.DataType]) -> None:
    """Write rows to a Parquet file, atomically.

    Args:
        path: of the file.
        rows: each with ``image`` (PNG bytes, or a mapping with ``bytes`` and ``path``) and the other fields.
        fields: names and types of the other fields.
    """

    def with_struct(row: Mapping[str, Any]) -> dict[str, Any]:
        image = row["image"]
        return {**row, "image": image if isinstance(image, Mapping) else {"bytes": image, "path": None}}

    schema = image_schema(fields)
    remaining = map(with_struct, rows)
    with writing_atomically(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        while group := list(islice(remaining, ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def read_image_parquet(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, or of all Parquet files of a folder in order of name; few rows are in memory at once.

    Files of a folder that have no ``image`` column are left out.

    Raises:
        InputError: a file is damaged, or the named file has no image column.
    """
    path = Path(path)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    for file in files:
        try:
            parquet = pq.ParquetFile(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError("not a readable Parquet file", where=file, fix=str(error)) from error
        if "image" not in parquet.schema_arrow.names:
            if path.is_dir():
                continue
            raise InputError("the Parquet file has no column `image`", where=file, fix="rename the image column")
        for batch in parquet.iter_batches(batch_size=64, columns=columns):
            yield from batch.to_pylist()


def image_set_name(index: int) -> str:
    """Relative path of image ``index`` of an image set."""
    return f"images/{index:06d}.png"


def finish_image_set(out: Path, rows: list[dict[str, Any]], fields: Mapping[str, pa.DataType]) -> None:
    """Write ``metadata.jsonl`` and ``images.parquet`` for the PNG files in ``out/images``.

    Args:
        out: folder of the image set.
        rows: ``rows[i]`` describes `image_set_name` ``(i)``, whose name is added here.
        fields: names and types of the values in the rows.
    """
    named = [{"file_name": image_set_name(index), **row} for index, row in enumerate(rows)]
    lines = "".join(json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in named)
    write_atomically(out / "metadata.jsonl", lines.encode())
    with_bytes = (
        {"image": {"bytes": (out / row["file_name"]).read_bytes(), "path": row["file_name"]}, **row} for row in named
    )
    write_image_parquet(out / "images.parquet", with_bytes, {"file_name": pa.string(), **fields})


def read_image_set(folder: Path) -> list[dict[str, Any]]:
    """Rows of an image set's ``metadata.jsonl``.

    Raises:
        InputError: the folder has none.
    """
    path = Path(folder) / "metadata.jsonl"
    if not path.is_file():
        raise InputError("not an image set: no metadata.jsonl", where=folder, fix="name a folder that ddsr has written")
    return [json.loads(line) for line in path.read_text().splitlines() if line]
