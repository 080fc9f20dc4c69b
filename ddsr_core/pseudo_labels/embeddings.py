"""Stage 2, embeddings: one feature vector per patch, in a LanceDB table (paper, II-A).

The networks are in `ddsr_core.pseudo_labels.embedders`, the layout of the files in ``docs/artifacts.md``.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddsr_core.config import Runtime, digest_of
from ddsr_core.errors import InputError
from ddsr_core.imaging.decode import decode_rgb
from ddsr_core.imaging.image_sets import read_image_parquet
from ddsr_core.parallel import RunParts, check_shared, in_parts, prefetch
from ddsr_core.pseudo_labels.config import EmbeddingsConfig
from ddsr_core.pseudo_labels.embedders import embed_batch, load_embedder
from ddsr_core.pseudo_labels.names import EMBEDDERS
from ddsr_core.pseudo_labels.photo_cache import VectorCache
from ddsr_core.storage.files import sha256_of, write_atomically, write_json
from ddsr_core.storage.stage import RESUME, Source, Stage, StageResult
from ddsr_core.storage.vector_table import content_digest, slices, write_table

#: Threads that decode patches while the network computes. A GPU needs all of them.
DECODERS = min(16, os.cpu_count() or 1)
#: Patches in a part, at least: every part loads the network.
PATCHES_PER_PART = 2048


def weights_source(config: EmbeddingsConfig) -> Source | None:
    """The weights file of a config as an input of the stage, so that its content enters the key; None for a tag."""
    path = Path(config.weights).expanduser()
    if not EMBEDDERS[config.backend].takes_weights or not path.is_file():
        return None
    return Source(path, sha256_of(path))


def run(config: EmbeddingsConfig, *, patches: Path, out: Path, runtime: Runtime, weights: Path | None = None) -> StageResult:
    """Embed every patch and write the table, in the order of the patches.

    Args:
        weights: the file of `weights_source`, if the config names one.

    Raises:
        MissingWeightsError: the network's weights are neither on this machine nor downloadable.
        InputError: there are no patches, or a vector is zero or not finite.
    """
    columns = _patch_columns(patches)
    ids = columns["patch_id"].to_pylist()
    cache = VectorCache(runtime.photo_cache, _vector_config(config, patches, weights) if runtime.photo_cache else "")
    known = cache.read()
    todo = [row for row, name in enumerate(ids) if name not in known]
    files = _embed(config, patches, todo, out, runtime, weights)

    def parts() -> Iterator[np.ndarray]:
        return _in_order(ids, known, files, config.batch_size)

    write_table(out, slices(columns, parts()))
    cache.finish(slices(columns, parts()))
    counts = {"patches": len(ids), "dimensions": int(next(parts()).shape[1]), "backend": config.backend}
    write_json(out / "summary.json", {**counts, "config": config.model_dump(mode="json")})
    return StageResult({**counts, "from_photo_cache": len(ids) - len(todo)}, digest=content_digest(ids, parts()))


@dataclass(frozen=True)
class BatchesToEmbed:
    """A part of the work, for a process that shares the file system.

    Attributes:
        patches: the patches artifact.
        batches: rows of the patches, by the file that receives their vectors.
        out: folder of the build.
        device: torch device.
        weights: the network's weights file, if the config names one.
    """

    config: EmbeddingsConfig
    patches: Path
    batches: dict[Path, list[int]]
    out: Path
    device: str
    weights: Path | None


def _embed(
    config: EmbeddingsConfig, patches: Path, todo: list[int], out: Path, runtime: Runtime, weights: Path | None
) -> list[Path]:
    """Embed the patches of these rows into one file per batch. Files of an interrupted build are reused."""
    folder, size = out / RESUME / f"vectors-{digest_of(todo)[:16]}", config.batch_size
    batches = {folder / f"{start:08d}.npy": todo[start : start + size] for start in range(0, len(todo), size)}
    missing = [(file, rows) for file, rows in batches.items() if not file.exists()]
    if not missing:
        return list(batches)
    smallest = max(1, PATCHES_PER_PART // size)
    parts = [
        BatchesToEmbed(config, patches, dict(part), out, runtime.device, weights)
        for part in ([missing] if runtime.run_parts is None else in_parts(missing, smallest))
    ]
    done = len(todo) - sum(len(rows) for _, rows in missing)
    with runtime.progress("Embedding patches", total=len(todo), unit="patches", done=done) as bar:
        for count in _embedded(parts, runtime.run_parts):
            bar.advance(count)
    return list(batches)


def _embedded(parts: list[BatchesToEmbed], run_parts: RunParts | None) -> Iterator[int]:
    """Embed the parts here or elsewhere; yields the number of patches that are newly embedded."""
    if run_parts is None or len(parts) < 2:
        yield from chain.from_iterable(map(_embed_batches, parts))
    else:
        for part, _ in zip(parts, run_parts(embed_part, parts), strict=True):
            yield sum(map(len, part.batches.values()))


def embed_part(part: BatchesToEmbed) -> None:
    """Embed some patches into the folder of the build that they belong to.

    Raises:
        StorageError: that folder is not on this machine.
    """
    check_shared(part.out)
    for _ in _embed_batches(part):
        pass


def _embed_batches(part: BatchesToEmbed) -> Iterator[int]:
    """Write the vectors of each batch; yields its number of patches."""
    embedder = load_embedder(part.config, part.device, part.weights)
    wanted = {row for rows in part.batches.values() for row in rows}
    decoded = prefetch(_decode, _rows(part.patches, wanted), DECODERS, in_flight=2 * part.config.batch_size)
    for file, rows in part.batches.items():
        names, images = zip(*islice(decoded, len(rows)), strict=True)
        _save(file, embed_batch(np.stack(images), embedder, part.config, names))
        yield len(names)


def _vector_config(config: EmbeddingsConfig, patches: Path, weights: Path | None) -> str:
    """Digest of everything but the patch id that a vector depends on: the network, and the size of a patch."""
    size = json.loads((patches / "summary.json").read_text())["patch_px"]
    return digest_of([STAGE.version, config.model_dump(mode="json"), sha256_of(weights) if weights else None, size])


def _in_order(ids: list[str], known: Mapping[str, np.ndarray], files: list[Path], size: int) -> Iterator[np.ndarray]:
    """Vectors of all patches, ``size`` rows at a time, from the photo cache and from the files."""
    fresh = chain.from_iterable(map(np.load, files))
    for start in range(0, len(ids), size):
        yield np.stack([known[name] if name in known else next(fresh) for name in ids[start : start + size]])


def _patch_columns(patches: Path) -> pa.Table:
    """``patch_id``, ``psnr_bic`` and ``photo`` of every patch, in order."""
    names = ["patch_id", "psnr_bic", "photo"]
    files = sorted(patches.glob("patches-*.parquet"))
    if not files:
        raise InputError("there are no patches", where=patches, fix="run the patches stage first")
    table = pa.concat_tables([pq.read_table(file, columns=names) for file in files])
    return table.select(names).replace_schema_metadata(None)


def _rows(patches: Path, wanted: set[int]) -> Iterator[dict[str, Any]]:
    """The patches of these rows. Files that contain none of them are not read."""
    start = 0
    for file in sorted(patches.glob("patches-*.parquet")):
        end = start + pq.read_metadata(file).num_rows
        if not wanted.isdisjoint(range(start, end)):
            rows = enumerate(read_image_parquet(file, ["image", "patch_id"]), start)
            yield from (row for number, row in rows if number in wanted)
        start = end


def _decode(row: dict[str, Any]) -> tuple[str, np.ndarray]:
    return row["patch_id"], decode_rgb(row["image"]["bytes"], row["patch_id"])


def _save(file: Path, vectors: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, vectors)
    write_atomically(file, buffer.getvalue())


def read_config(embeddings: Path) -> EmbeddingsConfig:
    """The config of an embeddings artifact, so that a query can be embedded in the same way."""
    return EmbeddingsConfig.model_validate(json.loads((embeddings / "summary.json").read_text())["config"])


STAGE = Stage(
    "embeddings",
    version=2,
    run=run,
    config=EmbeddingsConfig,
    section="II-A",
    on_gpu=True,
    photo_cache=True,
    words="{backend} embeddings of {patches:,} patches",
)
