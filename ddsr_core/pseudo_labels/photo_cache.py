"""Cache of scores and embeddings, so that only new photos of a growing source are scored and embedded.

A photo cache has no influence on what a stage writes, only on how long it takes, and may be deleted at any time. It belongs
to one photo source: entries of photos that the source has lost are removed.
"""

from __future__ import annotations

import hashlib
import shutil
import zlib
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa

from ddsr_core.storage.files import write_atomically
from ddsr_core.storage.store import LOG
from ddsr_core.storage.vector_table import TABLE, merge_table, read_table

#: Older versions of the table are not needed, but another process may still read the previous one.
KEEP_VERSIONS = timedelta(minutes=10)
#: Column of checksums in the table of embeddings.
_CHECK = "check"


class ScoreCache:
    """Scores by the digest of the photo's content, one small file per photo.

    Args:
        photo_cache: folder of the photo cache; with None the cache stays empty.
        config: digest of everything but the photo that the scores depend on.
    """

    def __init__(self, photo_cache: Path | None, config: str) -> None:
        self.folder = None if photo_cache is None else _folder_of(photo_cache / "scores", config)

    def get(self, digest: str) -> bytes | None:
        """The scores given to `put`; None if there are none, or they are damaged."""
        path = self._path(digest)
        if path is None or not path.is_file():
            return None
        check, _, scores = path.read_bytes().partition(b"\n")
        return scores if check == hashlib.sha256(scores).hexdigest().encode() else None

    def put(self, digest: str, scores: bytes) -> None:
        """Store the scores of a photo."""
        path = self._path(digest)
        if path is not None:
            write_atomically(path, hashlib.sha256(scores).hexdigest().encode() + b"\n" + scores)

    def known(self) -> set[str]:
        """Digests of the photos in the cache."""
        return set() if self.folder is None else {path.stem for path in self.folder.glob("*.json")}

    def finish(self, current: set[str]) -> None:
        """Remove all photos but those with these digests."""
        for digest in self.known() - current:
            path = self._path(digest)
            if path is not None:
                path.unlink()

    def _path(self, digest: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{digest}.json"


class VectorCache:
    """Embeddings by patch id, in a LanceDB table.

    Args:
        photo_cache: folder of the photo cache; with None the cache stays empty.
        config: digest of everything but the patch that a vector depends on.
    """

    def __init__(self, photo_cache: Path | None, config: str) -> None:
        self.folder = None if photo_cache is None else _folder_of(photo_cache / "embeddings", config)

    def read(self) -> dict[str, np.ndarray]:
        """All vectors: patch id -> ``float32 (d,)``. A damaged table (its creation may have been interrupted) is removed."""
        if self.folder is None or not (self.folder / "lancedb" / f"{TABLE}.lance").is_dir():
            return {}
        try:
            columns, vectors = read_table(self.folder)
            if columns[_CHECK].to_pylist() != _checks(columns, vectors):
                raise ValueError("a row is not what was written")
        except (OSError, RuntimeError, ValueError, KeyError) as error:  # the exceptions of LanceDB
            LOG.warning("%s: damaged; all patches are embedded again (%s)", self.folder, error)
            shutil.rmtree(self.folder / "lancedb")
            return {}
        return dict(zip(columns["patch_id"].to_pylist(), vectors, strict=True))

    def finish(self, parts: Iterable[tuple[pa.Table, np.ndarray]]) -> None:
        """Make the cache equal to this table of embeddings: insert new rows, delete missing ones, keep the rest."""
        if self.folder is not None:
            checked = (
                (columns.append_column(_CHECK, pa.array(_checks(columns, some), pa.int64())), some)
                for columns, some in parts
            )
            merge_table(self.folder, checked, KEEP_VERSIONS)


def _checks(columns: pa.Table, vectors: np.ndarray) -> list[int]:
    """A checksum of each row: of its patch id and its vector."""
    rows = zip(columns["patch_id"].to_pylist(), vectors, strict=True)
    return [zlib.crc32(vector.tobytes(), zlib.crc32(str(patch_id).encode())) for patch_id, vector in rows]


def _folder_of(folder: Path, config: str) -> Path:
    """The subfolder for a config. Those of other configs are removed."""
    wanted = folder / config[:16]
    for other in folder.glob("*"):
        if other != wanted:
            shutil.rmtree(other)
    wanted.mkdir(parents=True, exist_ok=True)
    return wanted
