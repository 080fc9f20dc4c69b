"""Stage 2, embeddings: one feature vector a patch, in a LanceDB table (paper, II-A).

Backends: ``open_clip`` (the paper's CLIP ViT-B/32) and ``vgg16`` (average-pooled conv5_3 of the VGG16 that installs
from the package registry: real features with no model hub).
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from ddsr_core.config import Runtime, StageConfig, digest_of
from ddsr_core.errors import InputError
from ddsr_core.imaging.images import decode_rgb, read_image_parquet, to_float
from ddsr_core.parallel import Spread, check_shared, in_parts, map_ahead
from ddsr_core.pseudo_labels.photo_cache import VectorCache
from ddsr_core.storage.store import RESUME, Source, Stage, StageResult, sha256_of, write_atomically, write_json
from ddsr_core.storage.vector_table import content_digest, slices, write_table

#: Threads that decode patches while the network works; a GPU needs all of them.
DECODERS = min(16, os.cpu_count() or 1)
#: Patches that are worth sending elsewhere: the network is loaded once a part.
PATCHES_PER_PART = 2048

if TYPE_CHECKING:
    import pyarrow as pa

    from ddsr_core.pseudo_labels.embedders import OpenClipEmbedder, Vgg16Embedder


class EmbeddingsConfig(StageConfig):
    """Which network describes a patch."""

    backend: Literal["open_clip", "vgg16"] = Field("open_clip", description="feature network")
    model: str = Field("ViT-B-32", description="open_clip architecture (open_clip only)")
    weights: str = Field(
        "openai",
        description="open_clip tag, or the path of a weights file (open_clip only). Files of tags trained with "
        "QuickGELU, such as openai, want a model named …-quickgelu",
    )
    image_px: int = Field(
        224, ge=32, le=1024, description="patches are scaled to this before the network, pixels (vgg16 only)"
    )
    normalize: bool = Field(True, description="scale every vector to length 1: k-means on the sphere")
    batch_size: int = Field(32, ge=1, le=4096, description="patches in one forward pass; lower it to save memory")


def weights_source(config: EmbeddingsConfig) -> Source | None:
    """The config's weights file as a further input of the stage, so that its content enters the key; None for a tag."""
    path = Path(config.weights).expanduser()
    if config.backend != "open_clip" or not path.is_file():
        return None
    return Source(path, sha256_of(path))


def load_embedder(
    config: EmbeddingsConfig, device: str = "cpu", weights: Path | None = None
) -> OpenClipEmbedder | Vgg16Embedder:
    """The network of the config, ready for inference on ``device``.

    Args:
        weights: an open_clip weights file in place of ``config.weights``.

    Raises:
        ConfigError: an unknown architecture.
        MissingWeightsError: weights that are neither on this machine nor reachable; the message says what to bring.
        InputError: weights of another architecture.
    """
    import torch

    from ddsr_core.pseudo_labels.embedders import OpenClipEmbedder, Vgg16Embedder

    embedder: OpenClipEmbedder | Vgg16Embedder
    if config.backend == "vgg16":
        embedder = Vgg16Embedder(config.image_px)
    else:
        embedder = OpenClipEmbedder(config.model, str(weights or config.weights))
    embedder.eval().requires_grad_(False).to(device)
    embedder.to(memory_format=torch.channels_last)  # faster convolutions, on CPUs and GPUs
    return embedder


def embed_images(
    images: np.ndarray, embedder: OpenClipEmbedder | Vgg16Embedder, config: EmbeddingsConfig, names: Sequence[str]
) -> np.ndarray:
    """Vectors ``float32 (B, d)`` of a batch ``uint8 (B, H, W, 3)``, of length 1 where the config says so.

    Raises:
        InputError: a vector is not finite, or is zero and has no direction; the image is named.
    """
    import torch

    with torch.inference_mode():
        device = next(embedder.parameters()).device
        vectors = embedder(to_float(images, device)).cpu().numpy()
    return finish_vectors(vectors, config.normalize, names)


def finish_vectors(vectors: np.ndarray, normalize: bool, names: Sequence[str]) -> np.ndarray:
    """Check vectors ``(B, d)`` and scale them to length 1 if ``normalize``.

    Raises:
        InputError: a vector is not finite, or zero.
    """
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(lengths[:, 0]) | (lengths[:, 0] == 0))
    if len(bad):
        kind = "a zero vector" if lengths[bad[0], 0] == 0 else "a vector that is not finite"
        raise InputError(
            f"the feature network gives {kind} for {len(bad)} of {len(vectors)} images of a batch",
            where=names[int(bad[0])],
            fix="check that embeddings.weights belong to embeddings.model, or set embeddings.backend=vgg16",
        )
    return np.ascontiguousarray(vectors / lengths if normalize else vectors, dtype=np.float32)


def run(config: EmbeddingsConfig, *, patches: Path, out: Path, runtime: Runtime, weights: Path | None = None) -> StageResult:
    """Embed every patch and write the table, in the order of the patches (layout: ``docs/artifacts.md``).

    Args:
        weights: file of `weights_source`, where the config names one.

    Raises:
        MissingWeightsError: the network's weights are not there.
        InputError: no patches, or vectors that cannot be used.
    """
    columns = _patch_columns(patches)
    ids = columns["patch_id"].to_pylist()
    photo_cache = VectorCache(runtime.photo_cache, _vector_config(config, patches, weights) if runtime.photo_cache else "")
    known = photo_cache.read()
    todo = [row for row, name in enumerate(ids) if name not in known]
    files = _embed(config, patches, todo, out, runtime, weights)

    def parts() -> Iterator[np.ndarray]:
        return _in_order(ids, known, files, config.batch_size)

    write_table(out, slices(columns, parts()))
    photo_cache.finish(slices(columns, parts()))
    counts = {"patches": len(ids), "dimensions": int(next(parts()).shape[1]), "backend": config.backend}
    write_json(out / "summary.json", {**counts, "config": config.model_dump(mode="json")})
    return StageResult({**counts, "from_memo": len(ids) - len(todo)}, digest=content_digest(ids, parts()))


@dataclass(frozen=True)
class BatchesToEmbed:
    """A part of the work, for a process that shares the file system.

    Attributes:
        batches: rows of the patches by the file that takes their vectors.
        out: folder of the build.
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
    """Embed the patches of these rows; a file of vectors a batch. Those of a build that was cut off are used."""
    folder, size = out / RESUME / f"vectors-{digest_of(todo)[:16]}", config.batch_size
    batches = {folder / f"{start:08d}.npy": todo[start : start + size] for start in range(0, len(todo), size)}
    missing = [(file, rows) for file, rows in batches.items() if not file.exists()]
    if not missing:
        return list(batches)
    smallest = max(1, PATCHES_PER_PART // size)
    parts = [
        BatchesToEmbed(config, patches, dict(part), out, runtime.device, weights)
        for part in ([missing] if runtime.spread is None else in_parts(missing, smallest))
    ]
    done = len(todo) - sum(len(rows) for _, rows in missing)
    with runtime.progress("Embedding patches", total=len(todo), unit="patches", done=done) as bar:
        for count in _embedded(parts, runtime.spread):
            bar.advance(count)
    return list(batches)


def _embedded(parts: list[BatchesToEmbed], spread: Spread | None) -> Iterator[int]:
    """Embed the parts, here or elsewhere; yields the number of patches that are new."""
    if spread is None or len(parts) < 2:
        yield from chain.from_iterable(map(_embed_batches, parts))
    else:
        for part, _ in zip(parts, spread(embed_part, parts), strict=True):
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
    decoded = map_ahead(_decode, _rows(part.patches, wanted), DECODERS, ahead=2 * part.config.batch_size)
    for file, rows in part.batches.items():
        names, images = zip(*islice(decoded, len(rows)), strict=True)
        _save(file, embed_batch(np.stack(images), embedder, part.config, names))
        yield len(names)


def embed_batch(
    images: np.ndarray, embedder: OpenClipEmbedder | Vgg16Embedder, config: EmbeddingsConfig, names: Sequence[str]
) -> np.ndarray:
    """`embed_images` in a batch of the config's size, filled up: kernels differ by size, and a vector must not change its
    last bits with the number of patches that are embedded beside it.
    """
    lacking = config.batch_size - len(images)
    whole = np.concatenate([images, np.repeat(images[-1:], lacking, axis=0)]) if lacking else images
    return embed_images(whole, embedder, config, [*names, *[names[-1]] * lacking])[: len(images)]


def _vector_config(config: EmbeddingsConfig, patches: Path, weights: Path | None) -> str:
    """Digest of what a patch's vector depends on besides the patch's id: the network, and the size of a patch."""
    size = json.loads((patches / "summary.json").read_text())["patch_px"]
    return digest_of([STAGE.version, config.model_dump(mode="json"), sha256_of(weights) if weights else None, size])


def _in_order(ids: list[str], known: Mapping[str, np.ndarray], files: list[Path], size: int) -> Iterator[np.ndarray]:
    """Vectors of all patches, ``size`` rows at a time: what is known, and the rest from the files."""
    fresh = chain.from_iterable(map(np.load, files))
    for start in range(0, len(ids), size):
        yield np.stack([known[name] if name in known else next(fresh) for name in ids[start : start + size]])


def _patch_columns(patches: Path) -> pa.Table:
    """``patch_id``, ``psnr_bic`` and ``photo`` of every patch, in order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ["patch_id", "psnr_bic", "photo"]
    files = sorted(patches.glob("patches-*.parquet"))
    if not files:
        raise InputError("there are no patches", where=patches, fix="run the patches stage first")
    table = pa.concat_tables([pq.read_table(file, columns=names) for file in files])
    return table.select(names).replace_schema_metadata(None)


def _rows(patches: Path, wanted: set[int]) -> Iterator[dict[str, Any]]:
    """The patches of these rows; a shard that has none of them is not read."""
    import pyarrow.parquet as pq

    start = 0
    for shard in sorted(patches.glob("patches-*.parquet")):
        end = start + pq.read_metadata(shard).num_rows
        if not wanted.isdisjoint(range(start, end)):
            rows = enumerate(read_image_parquet(shard, ["image", "patch_id"]), start)
            yield from (row for number, row in rows if number in wanted)
        start = end


def _decode(row: dict[str, Any]) -> tuple[str, np.ndarray]:
    return row["patch_id"], decode_rgb(row["image"]["bytes"], row["patch_id"])


def _save(file: Path, vectors: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, vectors)
    write_atomically(file, buffer.getvalue())


def read_config(embeddings: Path) -> EmbeddingsConfig:
    """The config that an embeddings artifact was made with, so that a query can be embedded alike."""
    return EmbeddingsConfig.model_validate(json.loads((embeddings / "summary.json").read_text())["config"])


STAGE = Stage("embeddings", version=2, run=run, config=EmbeddingsConfig, section="II-A", on_gpu=True, photo_cache=True)
