"""The table of vectors: written, read back, and its digest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ddsr_core.errors import InputError
from ddsr_core.storage.vector_table import content_digest, read_table, write_table


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(5000, 6)).astype(np.float32)
    columns = pa.table({"patch_id": [f"{index}" for index in range(5000)]})
    write_table(tmp_path, ((columns.slice(at, 700), vectors[at : at + 700]) for at in range(0, 5000, 700)))
    stored, back = read_table(tmp_path)
    assert stored.equals(columns)
    np.testing.assert_array_equal(back, vectors)


def test_the_digest_covers_ids_and_vectors_and_not_how_they_are_cut() -> None:
    vectors = np.arange(12, dtype=np.float32).reshape(4, 3)
    digest = content_digest("abcd", [vectors])
    assert digest == content_digest("abcd", [vectors[:1], vectors[1:]])
    assert digest != content_digest("abdc", [vectors])
    assert digest != content_digest("abcd", [vectors[::-1]])


def test_there_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no table of embeddings"):
        read_table(tmp_path)
