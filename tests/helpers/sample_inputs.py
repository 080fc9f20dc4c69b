"""Inputs of the sampling stage that fit `tiny_base`: embeddings, clusters with distances, latents."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddsr_core.imaging.decode import decode_rgb
from ddsr_core.pseudo_labels.config import EmbeddingsConfig
from ddsr_core.pseudo_labels.embedders import embed_images, load_embedder
from ddsr_core.storage.vector_table import write_table
from tests.helpers.tiny_base import SHAPE, write_clusters

EMBEDDINGS = EmbeddingsConfig(backend="vgg16", image_px=32)


def patch_rows(patches: Path) -> list[dict]:  # type: ignore[type-arg]
    return pq.read_table(patches).to_pylist()


def write_embeddings(folder: Path, patches: Path) -> Path:
    rows = patch_rows(patches)
    ids = [row["patch_id"] for row in rows]
    images = np.stack([decode_rgb(row["image"]["bytes"], row["patch_id"]) for row in rows])
    write_table(folder, [(pa.table({"patch_id": ids}), embed_images(images, load_embedder(EMBEDDINGS), EMBEDDINGS, ids))])
    (folder / "summary.json").write_text(json.dumps({"config": EMBEDDINGS.model_dump(mode="json")}))
    return folder


def write_clusters_with_distances(folder: Path, count: int = 24, k: int = 3) -> Path:
    """The distance falls from each cluster's first patch to its last: the order of a start is not that of the table."""
    write_clusters(folder, count, k)
    table = pq.read_table(folder / "labels.parquet")
    distances = np.linspace(1, 0.1, count).astype(np.float32)
    buffer = io.BytesIO()
    pq.write_table(table.append_column("distance", pa.array(distances)), buffer)
    (folder / "labels.parquet").write_bytes(buffer.getvalue())
    return folder


def write_random_latents(folder: Path, count: int = 24, px: int = SHAPE.latent_px) -> Path:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    np.save(folder / "mean.npy", random.standard_normal((2, count, SHAPE.in_channels, px, px)).astype(np.float16))
    ids = [f"{index:016x}_0_0" for index in range(count)]
    pq.write_table(pa.table({"patch_id": ids, "psnr_bic": np.full(count, 22, np.float32)}), folder / "patches.parquet")
    return folder
