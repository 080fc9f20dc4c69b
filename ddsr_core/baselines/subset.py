"""Stage `subset`: baselines that choose ``count`` images from a pool of random crops.

*k-center* (Sener & Savarese, ICLR 2018): greedily the crop that is farthest from those chosen, in embedding space.
*HDC* (Ding et al., IEEE SPL 2023): the half with the strongest gradients, clustered by texture into 15 clusters, with the
same number of images from each. Their texture network is not public: the clusters are of the run's own embeddings.
*loss-ranked* (Moser et al., arXiv 2403.17083): crops are ranked by the error of an SRCNN. Of the hardest half, without the
hardest 5 % of all crops, a random choice is taken. The SRCNN is trained here on the pool for a few hundred steps.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import nn

from ddsr_core.baselines.config import SubsetConfig
from ddsr_core.config import Runtime
from ddsr_core.errors import InputError
from ddsr_core.imaging.bicubic import gray, make_lr, upsample
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.image_sets import finish_image_set, image_set_name, read_image_set
from ddsr_core.imaging.images import to_float
from ddsr_core.pseudo_labels.embedders import embed_images, load_embedder
from ddsr_core.sampling.selection import farthest_first
from ddsr_core.storage.files import write_json
from ddsr_core.storage.stage import Stage, StageResult

BATCH = 16


def run(config: SubsetConfig, *, pool: Path, out: Path, runtime: Runtime, weights: Path | None = None) -> StageResult:
    """Write the image set of the chosen crops, with their rows of the pool.

    Args:
        config: criterion and number of images.
        pool: image set to choose from.
        out: output folder.
        runtime: device and progress.
        weights: open_clip weights file of the embeddings, if the config names one.

    Raises:
        InputError: the pool is not an image set, or is smaller than ``count``.
    """
    rows = read_image_set(pool)
    if len(rows) < config.count:
        raise InputError(
            f"a pool of {len(rows)} images cannot give {config.count}", where=pool, fix="use more photos or lower count"
        )
    chosen = [dict(rows[index]) for index in _CHOICES[config.kind](config, pool, runtime, weights)]
    (out / "images").mkdir(parents=True, exist_ok=True)
    for position, row in enumerate(chosen):
        shutil.copyfile(pool / row.pop("file_name"), out / image_set_name(position))
    finish_image_set(out, chosen, _fields(chosen[0]))
    psnr = [row["psnr_bic"] for row in chosen if "psnr_bic" in row]
    counts = {"kind": config.kind, "count": len(chosen), "pool": len(rows), "psnr_bic_mean": round(float(np.mean(psnr)), 4)}
    write_json(out / "summary.json", counts)
    return StageResult(counts)


def _fields(row: dict[str, Any]) -> dict[str, Any]:
    kinds = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    return {name: kinds[type(value)] for name, value in row.items()}


def by_k_center(config: SubsetConfig, pool: Path, runtime: Runtime, weights: Path | None) -> list[int]:
    """Indices chosen by *k-center* (see the module)."""
    return k_center(embed(config, pool, runtime, weights), config.count, config.seed)


def k_center(vectors: np.ndarray, count: int, seed: int) -> list[int]:
    """Indices of ``count`` rows of ``(n, d)``: a random row, then repeatedly the row farthest from all chosen ones."""
    return farthest_first(vectors, count, first=int(np.random.default_rng(seed).integers(len(vectors))))


def by_hdc(config: SubsetConfig, pool: Path, runtime: Runtime, weights: Path | None) -> list[int]:
    """Indices chosen by *HDC* (see the module)."""
    strength = np.concatenate([gradient_strength(batch) for batch in batches(pool, "Filtering", runtime)])
    vectors = embed(config, pool, runtime, weights)
    strong = np.argsort(-strength, kind="stable")[: max(config.count, round(config.keep * len(strength)))]
    return [int(strong[index]) for index in equal_draw(_texture(config, vectors[strong]), config.count, config.seed)]


def gradient_strength(batch: np.ndarray) -> np.ndarray:
    """Mean of ``0.5 |Sobel x| + 0.5 |Sobel y|`` over each image in gray: ``uint8 (B, H, W, 3)`` to ``(B,)``."""
    values = []
    for image in batch:
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        across, down = cv2.Sobel(gray, cv2.CV_32F, 1, 0), cv2.Sobel(gray, cv2.CV_32F, 0, 1)
        values.append(float((0.5 * np.abs(across) + 0.5 * np.abs(down)).mean()))
    return np.array(values)


def _texture(config: SubsetConfig, vectors: np.ndarray) -> np.ndarray:
    with threadpool_limits(1):  # fixed order of summation: the same clusters on every machine
        kmeans = KMeans(min(config.clusters, len(vectors)), n_init=10, random_state=config.seed)
        return np.asarray(kmeans.fit_predict(vectors))


def equal_draw(labels: np.ndarray, count: int, seed: int) -> list[int]:
    """``count`` indices, distributed as equally as possible over the labels; random within each label."""
    random = np.random.default_rng(seed)
    queues = [random.permutation(np.flatnonzero(labels == label)).tolist() for label in np.unique(labels)]
    chosen: list[int] = []
    while len(chosen) < count and any(queues):
        chosen += [queue.pop() for queue in queues if queue]
    return chosen[:count]


def by_loss(config: SubsetConfig, pool: Path, runtime: Runtime, weights: Path | None) -> list[int]:
    """Indices chosen by *loss ranking* (see the module)."""
    error = srcnn_errors(config, train_srcnn(config, pool, runtime), pool, runtime)
    return loss_ranked(error, config)


def loss_ranked(error: np.ndarray, config: SubsetConfig) -> list[int]:
    """Random choice from the hardest ``keep`` of all crops without the hardest ``drop``, given errors ``(n,)``."""
    hardest_first = np.argsort(-error, kind="stable")
    first = round(config.drop * len(error))
    last = max(round(config.keep * len(error)), min(len(error), first + config.count))
    if last - first < config.count:
        first = last - config.count
    return [int(i) for i in np.random.default_rng(config.seed).permutation(hardest_first[first:last])[: config.count]]


def train_srcnn(config: SubsetConfig, pool: Path, runtime: Runtime) -> nn.Module:
    """Train an SRCNN (Dong et al., TPAMI 2016; 9-1-5) on the bicubically enlarged crops of the pool, in gray."""
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
            crops = [_cut(read_rgb(paths[int(i)]), random, config.scale) for i in random.integers(len(paths), size=BATCH)]
            hr = to_float(np.stack(crops)).to(runtime.device)
            blurred, sharp = gray(upsample(make_lr(hr, config.scale), config.scale)), gray(hr)
            loss = (blurred + network(blurred) - sharp).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.advance()
    return network.eval()


def _cut(image: np.ndarray, random: np.random.Generator, scale: int, px: int = 48) -> np.ndarray:
    side = min(px, *(edge // scale * scale for edge in image.shape[:2]))
    y, x = (int(random.integers(edge - side + 1)) for edge in image.shape[:2])
    return image[y : y + side, x : x + side]


def srcnn_errors(config: SubsetConfig, network: nn.Module, pool: Path, runtime: Runtime) -> np.ndarray:
    """Mean squared error of the network on every image of the pool: ``(n,)``."""
    errors = []
    with torch.inference_mode():
        for batch in batches(pool, "Ranking by loss", runtime):
            hr = to_float(batch).to(runtime.device)
            blurred = gray(upsample(make_lr(hr, config.scale), config.scale))
            errors.append((blurred + network(blurred) - gray(hr)).square().mean((1, 2, 3)).cpu().numpy())
    return np.concatenate(errors)


def embed(config: SubsetConfig, pool: Path, runtime: Runtime, weights: Path | None) -> np.ndarray:
    """Embeddings of the pool in its order: float32 ``(n, d)``."""
    embedder = load_embedder(config.embeddings, runtime.device, weights)
    vectors: list[np.ndarray] = []
    for batch in batches(pool, "Embedding the pool", runtime):
        vectors.append(embed_images(batch, embedder, config.embeddings, [f"batch {len(vectors)}"] * len(batch)))
    return np.concatenate(vectors)


def batches(pool: Path, title: str, runtime: Runtime) -> Iterator[np.ndarray]:
    """Images of the pool in order, in batches: uint8 ``(B, H, W, 3)``."""
    paths = sorted((pool / "images").glob("*.png"))
    with runtime.progress(title, total=len(paths), unit="images") as bar:
        for start in range(0, len(paths), BATCH):
            batch = paths[start : start + BATCH]
            yield np.stack([read_rgb(path) for path in batch])
            bar.advance(len(batch))


_CHOICES: Mapping[str, Callable[[SubsetConfig, Path, Runtime, Path | None], list[int]]] = {
    "k-center": by_k_center,
    "hdc": by_hdc,
    "loss-ranked": by_loss,
}

STAGE = Stage("subset", version=1, run=run, config=SubsetConfig, section="III", on_gpu=True, words="{count:,} {kind} crops")
