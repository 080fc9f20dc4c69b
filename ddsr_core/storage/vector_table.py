"""The LanceDB table of vectors that the stages embeddings and clusters write and that search reads.

Functions here pass a table as a pair: the columns without the vectors (`pyarrow.Table`), and the vectors, ``float32
(N, d)``, one row per row of the table.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ddsr_core.errors import InputError

TABLE = "patches"


def _connect(folder: Path) -> Any:
    import lancedb  # two seconds, which a run from the cache does not have to wait

    return lancedb.connect(str(folder))


def write_table(out: Path, parts: Iterable[tuple[pa.Table, np.ndarray]]) -> None:
    """Write ``out/lancedb`` one part after the other. A table left by a killed run is replaced.

    Args:
        parts: (columns, vectors), at least one, all with the same columns and the same d.
    """
    shutil.rmtree(out / "lancedb", ignore_errors=True)
    batches = chain.from_iterable(_joined(columns, vectors).to_batches() for columns, vectors in parts)
    first = next(batches)
    _connect(out / "lancedb").create_table(TABLE, chain([first], batches), schema=first.schema)


def merge_table(out: Path, parts: Iterable[tuple[pa.Table, np.ndarray]], keep_versions: timedelta) -> None:
    """Make ``out/lancedb`` hold exactly these patches: new rows are inserted, missing ones deleted, the rest is not touched.

    Args:
        parts: as in `write_table`, with a column ``patch_id``.
        keep_versions: how long older versions of the table are kept.
    """
    rows = pa.concat_tables([_joined(columns, vectors) for columns, vectors in parts])
    database = _connect(out / "lancedb")
    if (out / "lancedb" / f"{TABLE}.lance").is_dir():
        table = database.open_table(TABLE)
        merge = table.merge_insert("patch_id").when_not_matched_insert_all().when_not_matched_by_source_delete()
        merge.execute(rows)
        table.optimize(cleanup_older_than=keep_versions)
    else:
        database.create_table(TABLE, rows)


def _joined(columns: pa.Table, vectors: np.ndarray) -> pa.Table:
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).ravel())
    return columns.append_column("vector", pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])).combine_chunks()


def read_table(folder: Path) -> tuple[pa.Table, np.ndarray]:
    """The complete table of an embeddings or clusters artifact: columns without ``vector``, and ``float32 (N, d)``.

    Raises:
        InputError: there is no such table.
    """
    table = open_table(folder).to_arrow()
    column = table["vector"].combine_chunks()
    vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return table.drop_columns(["vector"]), vectors


def open_table(folder: Path) -> Any:
    """The LanceDB table of an embeddings or clusters artifact.

    Raises:
        InputError: there is no such table.
    """
    path = Path(folder) / "lancedb"
    if not (path / f"{TABLE}.lance").is_dir():
        raise InputError("there is no table of embeddings", where=path, fix="run the embeddings stage first")
    return _connect(path).open_table(TABLE)


def content_digest(ids: Iterable[str], vectors: Iterable[np.ndarray]) -> str:
    """SHA-256 of patch ids and vectors. Not of the files, because LanceDB gives them random names."""
    digest = hashlib.sha256("\n".join(ids).encode())
    for part in vectors:
        digest.update(np.ascontiguousarray(part, dtype=np.float32).data)
    return digest.hexdigest()


def slices(columns: pa.Table, parts: Iterable[np.ndarray]) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Pair consecutive parts of the vectors with their rows of ``columns``."""
    start = 0
    for vectors in parts:
        yield columns.slice(start, len(vectors)), vectors
        start += len(vectors)
