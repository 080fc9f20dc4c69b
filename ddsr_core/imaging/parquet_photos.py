"""Pictures in Parquet files of any origin: their column, its format, and reading them with little memory.

The image column is the one that the metadata of ``datasets`` declares, or one of `COLUMNS`. Its values are structs of
``bytes`` and ``path`` in any order, plain bytes, or paths of files. A row without a picture is a picture that cannot be
used; a column of addresses (``https://…``) is refused.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ddsr_core.errors import InputError
from ddsr_core.imaging.decode import UnusableImage, plain_reason

#: Names of image columns, by preference. The last ones are those of img2dataset and WebDataset.
COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
#: Bytes of pictures that are read at once.
BATCH_BYTES = 32 << 20
#: Rows per batch, at most.
BATCH_ROWS = 64
#: Pictures that stay in memory for threads that request them shortly afterwards.
RECENT_ROWS, RECENT_BYTES = 64, 192 << 20


@dataclass(frozen=True)
class ParquetPicture:
    """One row.

    Attributes:
        name: the path in the row, else the number of the row.
        load: returns the bytes of the picture, which are read from the file only then.
    """

    name: str
    load: partial[bytes]


def parquet_pictures(files: list[Path], named: Path) -> Iterator[ParquetPicture]:
    """The pictures of Parquet files, in order; their bytes are not read.

    Args:
        files: read in turn. If there are several, those without an image column are skipped.
        named: the path that the user gave, for messages.

    Raises:
        InputError: a file is damaged, has no image column, or holds addresses in place of pictures.
    """
    row, seen = 0, set[str]()
    for file in files:
        column = _Column.of(file)
        if column is None:
            if named != file:
                continue
            raise InputError("the Parquet file has no column `image`", where=file, fix="rename the image column")
        for name, load in column.pictures():
            if not name or name in seen:
                name = f"{name}#{row}" if name else f"row-{row:08d}"
            seen.add(name)
            yield ParquetPicture(name, load)
            row += 1


def find_parquet(folder: Path) -> list[Path]:
    """The Parquet files of a folder, or, if there are none, those below it, as in data sets of the Hugging Face hub."""
    direct = sorted(path for path in folder.glob("*.parquet") if path.is_file())
    below = (path for path in folder.rglob("*.parquet") if path.is_file())
    hidden = (path for path in below if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return direct or sorted(hidden)


@dataclass(frozen=True)
class _Column:
    """The image column of one file."""

    file: Path
    name: str
    type: pa.DataType

    @classmethod
    def of(cls, file: Path) -> _Column | None:
        with _readable(file):
            schema = pq.read_schema(file)
        names = [name for name in (*_declared(schema), *COLUMNS) if name in schema.names]
        return cls(file, names[0], schema.field(names[0]).type) if names else None

    def pictures(self) -> Iterator[tuple[str, partial[bytes]]]:
        """Name (or an empty string) and loader of every row."""
        reader = _Rows(self.file, self.name)
        for row, name in enumerate(self._names(reader)):
            yield name, partial(_load, reader, row, self.file)

    def _names(self, reader: _Rows) -> Iterator[str]:
        kind = self.type.value_type if pa.types.is_dictionary(self.type) else self.type
        fields = {field.name for field in kind} if pa.types.is_struct(kind) else set()
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            yield from (_not_an_address(value, self) for value in reader.values(self.name))
        elif "path" in fields and ("bytes" in fields or len(fields) == 1):
            values = reader.values(f"{self.name}.path")
            yield from (value["path"] or "" if value else "" for value in values)
        elif "bytes" in fields or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            yield from ("" for _ in range(reader.count))
        else:
            raise InputError(
                f"the column {self.name!r} holds {kind}, not pictures",
                where=self.file,
                fix="store pictures as bytes, or as a struct of bytes and path",
            )


def _declared(schema: pa.Schema) -> list[str]:
    """Columns that the metadata of ``datasets`` declares as images."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [name for name, feature in features.items() if feature.get("_type") == "Image"]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []


def _not_an_address(value: str | None, column: _Column) -> str:
    if value and "://" in value[:16]:
        raise InputError(
            f"the column {column.name!r} holds addresses, not pictures: {value[:80]}",
            where=column.file,
            fix="download the pictures, for example with img2dataset, and name their folder",
        )
    return value or ""


def _load(reader: _Rows, row: int, file: Path) -> bytes:
    """The bytes of a row, or of the file that the row names.

    Raises:
        UnusableImage: the row has no picture, or the Parquet file is damaged.
        OSError: the file that the row names cannot be read.
    """
    value: Any = reader.get(row)
    path = None
    if isinstance(value, dict):
        value, path = value.get("bytes"), value.get("path")
    if isinstance(value, str):
        value, path = None, value
    if value is not None:
        return bytes(value)
    if not path:
        raise UnusableImage("no picture in this row", where=f"{file}, row {row}", fix="remove the row")
    return (file.parent / path).read_bytes()


class _Rows:
    """Random access to the rows of a column that is fast in ascending order. Few rows are in memory at once."""

    def __init__(self, file: Path, column: str) -> None:
        self.file, self.column = file, column
        with _readable(file), pq.ParquetFile(file) as parquet:
            metadata = parquet.metadata
            groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
            self.count = metadata.num_rows
        self.starts = [0]
        for group in groups:
            self.starts.append(self.starts[-1] + group.num_rows)
        sizes = [max(1, group.total_byte_size // max(1, group.num_rows)) for group in groups]
        self.batch_rows = [max(1, min(BATCH_ROWS, BATCH_BYTES // size)) for size in sizes]
        self._lock = threading.Lock()
        self._recent: OrderedDict[int, Any] = OrderedDict()
        self._bytes = 0
        self._next = 0
        self._stream: Iterator[tuple[int, Any]] | None = None

    def values(self, column: str) -> Iterator[Any]:
        """All values of a column (or of a field of it) in order."""
        name = self.column
        with _readable(self.file), pq.ParquetFile(self.file, pre_buffer=False) as parquet:
            for batch in parquet.iter_batches(batch_size=1024, columns=[column]):
                yield from batch.column(name).to_pylist()

    def get(self, row: int) -> Any:
        """The value of a row.

        Raises:
            UnusableImage: the file is damaged there.
        """
        with self._lock:
            if row in self._recent:
                return self._recent[row]
            if self._stream is None or row < self._next or self._group(row) != self._group(self._next):
                self._stream, self._next = self._from(row), self._start(row)
            try:
                for number, value in self._stream:
                    self._next = number + 1
                    self._keep(number, value)
                    if number == row:
                        return value
            except (OSError, pa.ArrowException) as error:
                self._stream = None
                reason = plain_reason(error)
                raise UnusableImage(
                    "the Parquet file is damaged", where=f"{self.file}, row {row}", fix=f"use an undamaged file ({reason})"
                ) from error
        raise UnusableImage("the Parquet file has lost rows", where=f"{self.file}, row {row}", fix="run again")

    def _group(self, row: int) -> int:
        return next(index for index, start in enumerate(self.starts[1:]) if row < start)

    def _start(self, row: int) -> int:
        return self.starts[self._group(row)]

    def _from(self, row: int) -> Iterator[tuple[int, Any]]:
        """Row numbers and values from the beginning of the row group that contains the row."""
        for group in range(self._group(row), len(self.starts) - 1):
            with pq.ParquetFile(self.file, pre_buffer=False, buffer_size=1 << 20) as parquet:
                number = self.starts[group]
                for batch in parquet.iter_batches(self.batch_rows[group], row_groups=[group], columns=[self.column]):
                    for value in batch.column(0):
                        yield number, value.as_py()
                        number += 1

    def _keep(self, number: int, value: Any) -> None:
        self._recent[number] = value
        self._bytes += _size(value)
        while len(self._recent) > 1 and (len(self._recent) > RECENT_ROWS or self._bytes > RECENT_BYTES):
            self._bytes -= _size(self._recent.popitem(last=False)[1])


def _size(value: Any) -> int:
    if isinstance(value, dict):
        value = value.get("bytes")
    return len(value) if isinstance(value, bytes | str) else 0


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn what pyarrow raises when it opens a file into an `InputError`."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise InputError("not a readable Parquet file", where=file, fix=plain_reason(error)) from error
