"""What is known of single photos and patches, so that a source which has grown is not scored and embedded all over again.

A photo cache changes nothing of what a stage writes, only how long it takes; it may be removed at any time. It belongs to
one photo source: what the source has lost is dropped from it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddsr_core.storage.store import LOG, write_atomically

if TYPE_CHECKING:
    import pyarrow as pa

#: The stages that use one.
STAGES = frozenset({"patches", "embeddings"})
#: Older versions of the table are of no use; a reader of the last one may still be at it.
KEEP_VERSIONS = timedelta(minutes=10)


class ScoreCache:
    """Scores of photos by the digest of their content: one small file each.

    Args:
        photo_cache: the photo_cache's folder; ``None`` knows nothing and keeps nothing.
        config: digest of what the scores depend on besides the photo.
    """

    def __init__(self, photo_cache: Path | None, config: str) -> None:
        self.folder = None if photo_cache is None else _only(photo_cache / "scores", config)

    def get(self, digest: str) -> bytes | None:
        """What `put` was given, or None."""
        path = self._path(digest)
        return path.read_bytes() if path is not None and path.is_file() else None

    def put(self, digest: str, scores: bytes) -> None:
        path = self._path(digest)
        if path is not None:
            write_atomically(path, scores)

    def known(self) -> set[str]:
        """Digests of the photos that are in it."""
        return set() if self.folder is None else {path.stem for path in self.folder.glob("*.json")}

    def finish(self, now: set[str]) -> None:
        """Drop what the source has lost."""
        for digest in self.known() - now:
            path = self._path(digest)
            if path is not None:
                path.unlink()

    def _path(self, digest: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{digest}.json"


class VectorCache:
    """Embeddings by patch id, in a LanceDB table.

    Args:
        photo_cache: the photo_cache's folder; ``None`` knows nothing and keeps nothing.
        config: digest of what a vector depends on besides the patch.
    """

    def __init__(self, photo_cache: Path | None, config: str) -> None:
        self.folder = None if photo_cache is None else _only(photo_cache / "embeddings", config)

    def read(self) -> dict[str, np.ndarray]:
        """Patch id -> ``float32 (d,)``. A table that cannot be read, as one cut off while it was made, is removed."""
        from ddsr_core.storage.vector_table import TABLE, read_table

        if self.folder is None or not (self.folder / "lancedb" / f"{TABLE}.lance").is_dir():
            return {}
        try:
            columns, vectors = read_table(self.folder)
        except (OSError, RuntimeError, ValueError) as error:  # what LanceDB raises
            LOG.warning("%s: damaged; every patch is embedded anew (%s)", self.folder, error)
            shutil.rmtree(self.folder / "lancedb")
            return {}
        return dict(zip(columns["patch_id"].to_pylist(), vectors, strict=True))

    def finish(self, parts: Iterable[tuple[pa.Table, np.ndarray]]) -> None:
        """Take the whole table of embeddings: new rows are inserted, those that are not in it removed, the rest stays."""
        from ddsr_core.storage.vector_table import merge_table

        if self.folder is not None:
            merge_table(self.folder, parts, KEEP_VERSIONS)


def _only(folder: Path, config: str) -> Path:
    """The subfolder of a config; those of other configs go."""
    wanted = folder / config[:16]
    for other in folder.glob("*"):
        if other != wanted:
            shutil.rmtree(other)
    wanted.mkdir(parents=True, exist_ok=True)
    return wanted
