"""Baselines that choose among real crops: k-center, HDC, loss-ranked. Each takes ``count`` images of a pool of random crops.

*k-center* (Sener & Savarese, ICLR 2018): greedily the crop that is farthest from those chosen, in embedding space.
*HDC* (Ding et al., IEEE SPL 2023): the half with the strongest gradients, clustered by texture into 15, as many from each
cluster. Their texture network is not at hand: the clusters are of the run's own embeddings.
*loss-ranked* (Moser et al., arXiv 2403.17083): an SRCNN's error on each crop; the hardest half without its hardest 5 % of
all, and of that a random choice. The SRCNN is trained here, on the pool, for a few hundred steps.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from ddsr_core.config import Runtime, StageConfig
from ddsr_core.errors import InputError
from ddsr_core.imaging import images
from ddsr_core.pseudo_labels.config import EmbeddingsConfig
from ddsr_core.sampling.selection import farthest_first
from ddsr_core.storage.files import write_json
from ddsr_core.storage.stage import Stage, StageResult

if TYPE_CHECKING:
    from torch import nn

BATCH = 16


class SubsetConfig(StageConfig):
    """Which images of a pool."""

    kind: Literal["k-center", "hdc", "loss-ranked"] = Field("k-center", description="what the choice goes by")
    count: int = Field(420, ge=1, description="images, as many as the distilled set has")
    seed: int = Field(42, ge=0, lt=2**31, description="of the choice, of k-means and of the SRCNN")
    embeddings: EmbeddingsConfig = Field(EmbeddingsConfig(), description="feature network; filled in from the run")
    clusters: int = Field(15, ge=1, le=1000, description="texture clusters (hdc)")
    keep: float = Field(0.5, gt=0, le=1, description="share of the pool that passes the filter (hdc, loss-ranked)")
    drop: float = Field(0.05, ge=0, lt=1, description="share of the hardest that is left out (loss-ranked)")
    srcnn_steps: int = Field(400, ge=1, le=100_000, description="training steps of the SRCNN (loss-ranked)")


def run(config: SubsetConfig, *, pool: Path, out: Path, runtime: Runtime, weights: Path | None = None) -> StageResult:
    """Write the image set of the chosen crops, with the rows that they have in the pool.

    Args:
        pool: image set to choose from.
        weights: open_clip weights file of the embeddings, where one is named.

    Raises:
        InputError: the pool is no image set, or is smaller than ``count``.
    """
    rows = images.read_image_set(pool)
    if len(rows) < config.count:
        raise InputError(
            f"a pool of {len(rows)} images cannot give {config.count}", where=pool, fix="bring more photos or ask for fewer"
        )
    chosen = {"k-center": by_k_center, "hdc": by_hdc, "loss-ranked": by_loss}[config.kind](config, pool, runtime, weights)
    kept = [dict(rows[index]) for index in chosen]
    (out / "images").mkdir(parents=True, exist_ok=True)
    for position, row in enumerate(kept):
        shutil.copyfile(pool / row.pop("file_name"), out / images.image_set_name(position))
    images.finish_image_set(out, kept, _fields(kept[0]))
    psnr = [row["psnr_bic"] for row in kept if "psnr_bic" in row]
    counts = {"kind": config.kind, "count": len(kept), "pool": len(rows), "psnr_bic_mean": round(float(np.mean(psnr)), 4)}
    write_json(out / "summary.json", counts)
    return StageResult(counts)


def _fields(row: dict[str, Any]) -> dict[str, Any]:
    import pyarrow as pa

    kinds = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    return {name: kinds[type(value)] for name, value in row.items()}


def by_k_center(config: SubsetConfig, pool: Path, runtime: Runtime, weights: Path | None) -> list[int]:
    """See the module's text."""
    return k_center(embed(config, pool, runtime, weights), config.count, config.seed)


def k_center(vectors: np.ndarray, count: int, seed: int) -> list[int]:
    """Indices of ``count`` rows of ``(n, d)``: a random one, then again and again the one farthest from all before."""
    return farthest_first(vectors, count, first=int(np.random.default_rng(seed).integers(len(vectors))))


def by_hdc(config: SubsetConfig, pool: Path, runtime: Runtime, weights: Path | None) -> list[int]:
    """See the module's text."""
    strength = np.concatenate([gradient_strength(batch) for batch in batches(pool, "Filtering", runtime)])
    vectors = embed(config, pool, runtime, weights)
    strong = np.argsort(-strength, kind="stable")[: max(config.count, round(config.keep * len(strength)))]
    return [int(strong[index]) for index in equal_draw(_texture(config, vectors[strong]), config.count, config.seed)]


def gradient_strength(batch: np.ndarray) -> np.ndarray:
    """Mean of ``0.5 |Sobel x| + 0.5 |Sobel y|`` of the gray images ``uint8 (B, H, W, 3)``; ``(B,)``."""
    import cv2

    values = []
    for image in batch:
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        across, down = cv2.Sobel(gray, cv2.CV_32F, 1, 0), cv2.Sobel(gray, cv2.CV_32F, 0, 1)
        values.append(float((0.5 * np.abs(across) + 0.5 * np.abs(down)).mean()))
    return np.array(values)


def _texture(config: SubsetConfig, vectors: np.ndarray) -> np.ndarray:
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # partial sums in one order: the same clusters on every machine
        found = KMeans(min(config.clusters, len(vectors)), n_init=10, random_state=config.seed).fit_predict(vectors)
    return np.asarray(found)


def equal_draw(labels: np.ndarray, count: int, seed: int) -> list[int]:
    """``count`` indices, as many of each label as possible: labels in turn, each giving its images in random order."""
    random = np.random.default_rng(seed)
    queues = [random.permutation(np.flatnonzero(labels == label)).tolist() for label in np.unique(labels)]
    chosen: list[int] = []
    while len(chosen) < count and any(queues):
        chosen += [queue.pop() for queue in queues if queue]
    return chosen[:count]


def by_loss(config: SubsetConfig, pool: Path, runtime: Runtime, weights: Path | None) -> list[int]:
    """See the module's text."""
    error = srcnn_errors(train_srcnn(config, pool, runtime), pool, runtime)
    return loss_ranked(error, config)


def loss_ranked(error: np.ndarray, config: SubsetConfig) -> list[int]:
    """A random choice of the hardest ``keep`` without the hardest ``drop`` of all, from errors ``(n,)``."""
    hardest_first = np.argsort(-error, kind="stable")
    first = round(config.drop * len(error))
    last = max(round(config.keep * len(error)), min(len(error), first + config.count))
    if last - first < config.count:
        first = last - config.count
    return [int(i) for i in np.random.default_rng(config.seed).permutation(hardest_first[first:last])[: config.count]]


def train_srcnn(config: SubsetConfig, pool: Path, runtime: Runtime) -> nn.Module:
    """An SRCNN (Dong et al., TPAMI 2016; 9-1-5) that sharpens the gray, bicubically enlarged crops of the pool."""
    import torch
    from torch import nn

    from ddsr_core.imaging.bicubic import gray, make_lr, upsample
    from ddsr_core.imaging.images import to_float

    paths = sorted((pool / "images").glob("*.png"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = nn.Sequential(
            nn.Conv2d(1, 64, 9, padding=4), nn.ReLU(), nn.Conv2d(64, 32, 1), nn.ReLU(), nn.Conv2d(32, 1, 5, padding=2)
        ).to(runtime.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    with runtime.progress("Training the SRCNN", total=config.srcnn_steps, unit="steps") as bar:
        for step in range(config.srcnn_steps):
            random = np.random.default_rng([config.seed, step])
            crops = [_cut(images.read_rgb(paths[int(i)]), random) for i in random.integers(len(paths), size=BATCH)]
            hr = to_float(np.stack(crops)).to(runtime.device)
            blurred, sharp = gray(upsample(make_lr(hr))), gray(hr)
            loss = (blurred + network(blurred) - sharp).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.advance()
    return network.eval()


def _cut(image: np.ndarray, random: np.random.Generator, px: int = 48) -> np.ndarray:
    side = min(px, *(edge // 4 * 4 for edge in image.shape[:2]))
    y, x = (int(random.integers(edge - side + 1)) for edge in image.shape[:2])
    return image[y : y + side, x : x + side]


def srcnn_errors(network: nn.Module, pool: Path, runtime: Runtime) -> np.ndarray:
    """Mean squared error of the network on every image of the pool ``(n,)``."""
    import torch

    from ddsr_core.imaging.bicubic import gray, make_lr, upsample
    from ddsr_core.imaging.images import to_float

    errors = []
    with torch.inference_mode():
        for batch in batches(pool, "Ranking by loss", runtime):
            hr = to_float(batch).to(runtime.device)
            blurred = gray(upsample(make_lr(hr)))
            errors.append((blurred + network(blurred) - gray(hr)).square().mean((1, 2, 3)).cpu().numpy())
    return np.concatenate(errors)


def embed(config: SubsetConfig, pool: Path, runtime: Runtime, weights: Path | None) -> np.ndarray:
    """Embeddings of the pool ``float32 (n, d)``, in its order."""
    from ddsr_core.pseudo_labels.embedders import embed_images, load_embedder

    embedder = load_embedder(config.embeddings, runtime.device, weights)
    vectors: list[np.ndarray] = []
    for batch in batches(pool, "Embedding the pool", runtime):
        vectors.append(embed_images(batch, embedder, config.embeddings, [f"batch {len(vectors)}"] * len(batch)))
    return np.concatenate(vectors)


def batches(pool: Path, title: str, runtime: Runtime) -> Iterator[np.ndarray]:
    """Images of the pool ``uint8 (B, H, W, 3)`` in order, a few at a time."""
    paths = sorted((pool / "images").glob("*.png"))
    with runtime.progress(title, total=len(paths), unit="images") as bar:
        for start in range(0, len(paths), BATCH):
            some = paths[start : start + BATCH]
            yield np.stack([images.read_rgb(path) for path in some])
            bar.advance(len(some))


STAGE = Stage("subset", version=1, run=run, config=SubsetConfig, section="III", on_gpu=True)
