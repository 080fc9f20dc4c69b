"""Inputs of the sampling stage that fit `tiny_base`: adapter, embeddings, clusters with distances, latents, a teacher."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from ddsr_core.config import Runtime
from ddsr_core.diffusion import finetune
from ddsr_core.diffusion.config import FinetuneConfig
from ddsr_core.imaging.bicubic import upsample
from ddsr_core.imaging.decode import decode_rgb
from ddsr_core.pseudo_labels.config import EmbeddingsConfig
from ddsr_core.pseudo_labels.embedders import embed_images, load_embedder
from ddsr_core.sr.networks import build_network
from ddsr_core.sr.weights import save_weights
from ddsr_core.storage.vector_table import write_table
from tests.helpers.tiny_base import SHAPE, write_base, write_clusters, write_latents, write_patches

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
    """The distance falls from each cluster's first patch to its last, so that patches by distance are not in table order."""
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


def write_sample_inputs(home: Path) -> dict[str, Path]:
    """Everything that the stage reads, with a barely fine-tuned adapter."""
    made = {
        "patches": write_patches(home / "patches", count=25),
        "clusters": write_clusters_with_distances(home / "clusters", count=25, k=3),
        "base": write_base(home / "base"),
    }
    learned = {"latents": write_latents(home / "latents", made["patches"], made["base"]), "clusters": made["clusters"]}
    config = FinetuneConfig(steps=2, epochs=None, batch_size=4, gamma_blocks=2, sample_every=2)
    finetune.run(config, **learned, base=made["base"], out=home / "adapter", runtime=Runtime())
    return {**made, "adapter": home / "adapter", "embeddings": write_embeddings(home / "embeddings", made["patches"])}


def write_teacher(folder: Path) -> Path:
    """A small random SR network, as a train_sr artifact."""
    torch.manual_seed(0)
    kwargs = {"feat": 4, "blocks": 1}
    save_weights(folder, build_network("edsr-small", kwargs), "edsr-small", kwargs, 4, {})
    return folder


class Bicubic(nn.Module):
    """Enlarges as bicubic does."""

    def forward(self, lr: torch.Tensor) -> torch.Tensor:
        return upsample(lr)


class KnowsTheAnswer(nn.Module):
    """Returns the HR images that it was given."""

    def __init__(self, hr: torch.Tensor) -> None:
        super().__init__()
        self.hr = hr

    def forward(self, lr: torch.Tensor) -> torch.Tensor:
        return self.hr
