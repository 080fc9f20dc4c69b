"""Stage 2, embeddings: one feature vector a patch, in a LanceDB table (paper, II-A).

Backends: ``open_clip`` (the paper's CLIP ViT-B/32) and ``vgg16`` (average-pooled conv5_3 of the VGG16 that installs
from the package registry: real features with no model hub).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from pydantic import Field

from ddsr_core.config import Runtime, StageConfig
from ddsr_core.errors import InputError, MissingWeightsError
from ddsr_core.images import decode_rgb, read_image_parquet, to_float
from ddsr_core.store import RESUME, Stage, StageResult, write_atomically, write_json

if TYPE_CHECKING:
    from torch import Tensor

TABLE = "patches"


class EmbeddingsConfig(StageConfig):
    """Which network describes a patch."""

    backend: Literal["open_clip", "vgg16"] = Field("open_clip", description="feature network")
    model: str = Field("ViT-B-32", description="open_clip architecture (open_clip only)")
    weights: str = Field("openai", description="open_clip tag, or the path of a weights file (open_clip only)")
    image_px: int = Field(224, ge=32, description="patches are resized to this before the network (vgg16 only), pixels")
    normalize: bool = Field(True, description="scale every vector to length 1: k-means on the sphere")
    batch_size: int = Field(32, ge=1, le=4096, description="patches a forward pass")


class Embedder(Protocol):
    """Describes images: ``float (B, 3, H, W)`` in [0, 1] to ``float32 (B, d)``, not normalised."""

    def __call__(self, images: Tensor) -> Tensor: ...


def load_embedder(config: EmbeddingsConfig, device: str = "cpu") -> Embedder:
    """The network of the config, ready on ``device``.

    Raises:
        MissingWeightsError: weights that are neither installed nor reachable.
    """
    return _vgg16(config, device) if config.backend == "vgg16" else _open_clip(config, device)


def _vgg16(config: EmbeddingsConfig, device: str) -> Embedder:
    import torch
    from torch.nn import functional as F
    from torchvision.models import vgg16

    from ddsr_core.lpips_weights import load_trunk

    with torch.device("meta"):
        features = vgg16().features[:30]  # up to the ReLU after conv5_3
    features.load_state_dict({k.removeprefix("features."): v for k, v in load_trunk("vgg16").items()}, assign=True)
    features = features.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device)[None, :, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], device=device)[None, :, None, None]

    def embed(images: Tensor) -> Tensor:
        size = (config.image_px, config.image_px)
        x = F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        maps: Tensor = features(((x - mean) / std).contiguous(memory_format=torch.channels_last))
        return maps.mean((2, 3))

    return embed


def _open_clip(config: EmbeddingsConfig, device: str) -> Embedder:
    import open_clip
    import torch
    from torch.nn import functional as F

    is_file = Path(config.weights).expanduser().is_file()
    known = {tag for name, tag in open_clip.list_pretrained() if name == config.model}
    if not is_file and config.weights not in known:
        raise MissingWeightsError(
            f"open_clip knows no weights {config.weights!r} for {config.model}, and there is no such file",
            where="embeddings.weights",
            mend=f"name a weights file, or one of: {', '.join(sorted(known)) or 'none for this model'}",
        )
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            config.model,
            pretrained=str(Path(config.weights).expanduser()) if is_file else config.weights,
            weights_only=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise MissingWeightsError(
            f"the weights {config.weights!r} of {config.model} cannot be loaded: {str(error).splitlines()[0]}",
            where="embeddings.weights",
            mend="with no network: bring open_clip_model.safetensors of that model and set "
            "embeddings.weights=/path/to/it, or set embeddings.backend=vgg16",
        ) from error
    model = model.eval().requires_grad_(False).to(device)
    normalize = preprocess.transforms[-1]
    side = model.visual.image_size
    size = (side, side) if isinstance(side, int) else tuple(side)
    mean = torch.tensor(normalize.mean, device=device)[None, :, None, None]
    std = torch.tensor(normalize.std, device=device)[None, :, None, None]

    def embed(images: Tensor) -> Tensor:
        x = F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        vectors: Tensor = model.encode_image((x - mean) / std)
        return vectors.float()

    return embed


def embed_images(images: list[np.ndarray], embedder: Embedder, normalize: bool, device: str) -> np.ndarray:
    """Vectors ``float32 (N, d)`` of equally large ``uint8 (H, W, 3)`` images.

    Raises:
        InputError: a vector is not finite, or zero where it should be scaled to length 1.
    """
    import torch

    with torch.inference_mode():
        vectors = embedder(to_float(np.stack(images)).to(device)).float().cpu().numpy()
    if not np.isfinite(vectors).all():
        raise InputError("the feature network gave a value that is not finite", mend="check embeddings.weights")
    if normalize:
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        if (lengths == 0).any():
            raise InputError("the feature network gave a zero vector", mend="set embeddings.normalize=false")
        vectors = vectors / lengths
    return np.ascontiguousarray(vectors, dtype=np.float32)


def run(config: EmbeddingsConfig, *, patches: Path, out: Path, runtime: Runtime) -> StageResult:
    """Embed every patch and write the table, in the order of the patches.

    Raises:
        MissingWeightsError: the network's weights are not there.
        InputError: no patches, or vectors that are not finite.
    """
    total = int(json.loads((patches / "summary.json").read_text())["accepted"])
    parts = out / RESUME / "vectors"
    parts.mkdir(parents=True, exist_ok=True)
    count = -(-total // config.batch_size)
    done = sum(_part(parts, index).exists() for index in range(count))
    if done < count:
        embedder = load_embedder(config, runtime.device)
        with runtime.progress("Embedding patches", total=total, unit="patches", done=done * config.batch_size) as bar:
            for index, rows in enumerate(_batches(patches, config.batch_size)):
                if _part(parts, index).exists():
                    continue
                images = [decode_rgb(row["image"]["bytes"], row["patch_id"]) for row in rows]
                vectors = embed_images(images, embedder, config.normalize, runtime.device)
                write_atomically(_part(parts, index), vectors.tobytes())
                bar.advance(len(rows))
    columns = _patch_columns(patches)
    vectors = np.concatenate([np.frombuffer(_part(parts, index).read_bytes(), np.float32) for index in range(count)])
    vectors = vectors.reshape(total, -1)
    write_table(out / "lancedb", {**columns, "vector": vectors})
    counts = {"patches": total, "dimensions": vectors.shape[1], "backend": config.backend}
    write_json(out / "summary.json", {**counts, "config": config.model_dump(mode="json")})
    return StageResult(counts, digest=table_digest(columns["patch_id"], vectors))


def _part(folder: Path, index: int) -> Path:
    return folder / f"{index:08d}.f32"


def _batches(patches: Path, size: int) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    for row in read_image_parquet(patches, ["image", "patch_id"]):
        rows.append(row)
        if len(rows) == size:
            yield rows
            rows = []
    if rows:
        yield rows


def _patch_columns(patches: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ["patch_id", "psnr_bic", "photo"]
    table = pa.concat_tables([pq.read_table(file, columns=names) for file in sorted(patches.glob("patches-*.parquet"))])
    return {name: table[name].to_pylist() for name in names}


def write_table(folder: Path, columns: dict[str, Any]) -> None:
    """Write a LanceDB table ``patches`` from columns; ``vector`` is ``float32 (N, d)``. Replaces an unfinished one."""
    import lancedb
    import pyarrow as pa

    vectors = np.ascontiguousarray(columns["vector"], dtype=np.float32)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    table = pa.table({**{name: values for name, values in columns.items() if name != "vector"}, "vector": flat})
    lancedb.connect(str(folder)).create_table(TABLE, table, mode="overwrite")


def read_table(folder: Path, columns: list[str] | None = None) -> dict[str, Any]:
    """Columns of the table in ``folder`` (an embeddings or clusters artifact); ``vector`` as ``float32 (N, d)``.

    Raises:
        InputError: there is no such table.
    """
    import lancedb

    path = Path(folder) / "lancedb"
    if not (path / f"{TABLE}.lance").is_dir():
        raise InputError("no table of embeddings", where=path, mend="run the embeddings stage first")
    table = lancedb.connect(str(path)).open_table(TABLE).to_arrow()
    result: dict[str, Any] = {}
    for name in columns or table.column_names:
        column = table[name].combine_chunks()
        if name == "vector":
            result[name] = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
        else:
            result[name] = column.to_pylist()
    return result


def table_digest(ids: list[str], vectors: np.ndarray) -> str:
    """SHA-256 of the content of a table: LanceDB names its files at random, so their bytes say nothing."""
    digest = hashlib.sha256("\n".join(ids).encode())
    digest.update(np.ascontiguousarray(vectors, dtype=np.float32).tobytes())
    return digest.hexdigest()


STAGE = Stage("embeddings", version=1, run=run)
