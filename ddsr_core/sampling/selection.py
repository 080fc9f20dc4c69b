"""Comparing samples with the accepted patches, and choosing among them.

What is kept should be distributed as the real accepted patches of its pseudo-label are: the same histogram of PSNR_bic,
and the same region of the embedding space. Never the lowest PSNR_bic: those are the artifacts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ddsr_core.config import Runtime
from ddsr_core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Select = Literal["none", "psnr_bic", "psnr_bic_and_coverage"]

THUMBNAIL_PX = 32
COMPARE_BATCH = 32
VECTOR_BATCH = 1024
#: Real vectors of a pseudo-label that coverage is measured on: a random subset of so many where there are more.
COVERAGE_SAMPLE = 2000
#: Random choices of the same size that a choice is compared with.
RANDOM_DRAWS = 20


class Nearest:
    """For each of ``count`` candidates the most similar training patch of those shown so far.

    Attributes:
        cosine: similarity to it ``(count,)``, at most 1; ``patch_id``: its id.
    """

    def __init__(self, count: int) -> None:
        self.cosine = np.full(count, -np.inf, np.float32)
        self.patch_id = [""] * count

    def show(self, cosine: np.ndarray, names: Sequence[str]) -> None:
        """Take notice of further patches: ``cosine (count, len(names))``."""
        winner = cosine.argmax(1)
        best = np.minimum(cosine.max(1), 1)  # rounding: a copy must not be more than a copy
        for index in np.flatnonzero(best > self.cosine):
            self.cosine[index], self.patch_id[index] = best[index], names[winner[index]]


@dataclass(frozen=True)
class Comparison:
    """Candidates and accepted patches side by side. PSNR_bic with the antialiased kernel, dB; vectors of length 1.

    Attributes:
        psnr_bic: of the candidates ``(n,)``; ``vectors``: their embeddings ``(n, d)``.
        by_pixels, by_embedding: the training patch that each candidate is most similar to.
        real_psnr_bic: of the accepted patches ``(N,)``; ``real_labels``: their pseudo-labels ``(N,)``.
        real_vectors: for each pseudo-label embeddings of its patches ``(at most COVERAGE_SAMPLE, d)``.
    """

    psnr_bic: np.ndarray
    vectors: np.ndarray
    by_pixels: Nearest
    by_embedding: Nearest
    real_psnr_bic: np.ndarray
    real_labels: np.ndarray
    real_vectors: list[np.ndarray]


@dataclass(frozen=True)
class Scores:
    """How well a choice stands for a pseudo-label's real patches.

    Attributes:
        psnr_bic_wasserstein_db: Wasserstein-1 distance between the PSNR_bic of the two, dB; 0 is best.
        coverage: mean over the real vectors of the largest cosine to a chosen one; 1 is best.
    """

    psnr_bic_wasserstein_db: float
    coverage: float


def thumbnail_vectors(images: Tensor) -> np.ndarray:
    """What similarity by pixels is measured on: 32-px thumbnails, mean removed, of length 1.

    Args:
        images: ``float (B, 3, H, W)`` in [0, 1].

    Returns:
        ``float32 (B, 3072)``; the dot product of two is their cosine similarity, 1 for a copy.
    """
    import torch.nn.functional as F

    small = F.interpolate(images, size=(THUMBNAIL_PX, THUMBNAIL_PX), mode="area").flatten(1)
    return F.normalize(small - small.mean(1, keepdim=True), dim=1).cpu().numpy()


def compare(
    candidates: list[Path], patches: Path, clusters: Path, embeddings: Path, weights: Path | None, runtime: Runtime
) -> Comparison:
    """Describe candidates and patches alike, and find each candidate's nearest patch by pixels and by embedding.

    Patches and their vectors pass by a batch at a time: of a patch no more stays than its id, pseudo-label and
    PSNR_bic, and of each pseudo-label `COVERAGE_SAMPLE` vectors.

    Args:
        candidates: PNG files, all of one size.
        weights: open_clip weights file, where the embeddings were made with one.

    Raises:
        InputError: the artifacts do not belong together.
    """
    from ddsr_core.diffusion.latents import batches_of_patches
    from ddsr_core.diffusion.training_set import label_of
    from ddsr_core.imaging.bicubic import psnr_bic
    from ddsr_core.imaging.images import to_float
    from ddsr_core.pseudo_labels.clusters import read_labels

    of_patch = read_labels(clusters)
    psnr, thumbnails, vectors, side = _describe(candidates, embeddings, weights, runtime)
    by_pixels, by_embedding = Nearest(len(candidates)), Nearest(len(candidates))
    real_psnr: list[float] = []
    real_labels: list[int] = []
    with runtime.progress("Comparing with real patches", total=len(of_patch), unit="patches") as bar:
        for names, pixels in batches_of_patches(patches, side):
            real = to_float(pixels)
            real_psnr += psnr_bic(real).tolist()
            real_labels += [label_of(of_patch, name) for name in names]
            by_pixels.show((thumbnails @ thumbnail_vectors(real).T).max(0), names)
            bar.advance(len(names))
    kept = _sampled(of_patch)
    real_vectors: dict[int, list[np.ndarray]] = {label: [] for label in kept.values()}
    for names, real_batch in _stored_vectors(embeddings):
        by_embedding.show(vectors @ real_batch.T, names)
        for name, vector in zip(names, real_batch, strict=True):
            if name in kept:
                real_vectors[kept[name]].append(vector)
    if sum(map(len, real_vectors.values())) != len(kept):
        raise InputError(
            "patches of the clusters have no embedding", where=embeddings, fix="give the embeddings that were clustered"
        )
    stacked = [np.stack(real_vectors[label]) for label in sorted(real_vectors)]
    return Comparison(psnr, vectors, by_pixels, by_embedding, np.array(real_psnr), np.array(real_labels), stacked)


def _describe(
    candidates: list[Path], embeddings: Path, weights: Path | None, runtime: Runtime
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """PSNR_bic ``(n,)``, thumbnails as they are and mirrored ``(2, n, 3072)``, embeddings ``(n, d)``, side in pixels."""
    from ddsr_core.imaging.bicubic import psnr_bic
    from ddsr_core.imaging.decode import read_rgb
    from ddsr_core.imaging.images import to_float
    from ddsr_core.pseudo_labels.embedders import embed_images, load_embedder
    from ddsr_core.pseudo_labels.embeddings import read_config

    config = read_config(embeddings)
    embedder = load_embedder(config, runtime.device, weights)
    psnr: list[float] = []
    thumbnails, vectors = [], []
    with runtime.progress("Describing the samples", total=len(candidates), unit="images") as bar:
        for start in range(0, len(candidates), COMPARE_BATCH):
            paths = candidates[start : start + COMPARE_BATCH]
            pixels = np.stack([read_rgb(path) for path in paths])
            images = to_float(pixels)
            psnr += psnr_bic(images).tolist()
            thumbnails.append(np.stack([thumbnail_vectors(images), thumbnail_vectors(images.flip(3))]))
            vectors.append(unit_length(embed_images(pixels, embedder, config, [path.name for path in paths])))
            bar.advance(len(paths))
    return np.array(psnr), np.concatenate(thumbnails, axis=1), np.concatenate(vectors), pixels.shape[1]


def _sampled(of_patch: dict[str, int]) -> dict[str, int]:
    """Ids and pseudo-labels of the patches that coverage is measured on; the same ones whatever is sampled."""
    ids, labels = np.array(list(of_patch)), np.array(list(of_patch.values()))
    random = np.random.default_rng(0)
    chosen = [random.permutation(np.flatnonzero(labels == label))[:COVERAGE_SAMPLE] for label in np.unique(labels)]
    return {str(ids[index]): int(labels[index]) for index in np.concatenate(chosen)}


def _stored_vectors(embeddings: Path) -> Iterator[tuple[list[str], np.ndarray]]:
    """Patch ids and unit vectors ``float32 (n, d)`` of an embeddings artifact, `VECTOR_BATCH` at a time."""
    from ddsr_core.storage.vector_table import open_table

    for batch in open_table(embeddings).search().select(["patch_id", "vector"]).to_batches(VECTOR_BATCH):
        vectors = batch["vector"].flatten().to_numpy().reshape(batch.num_rows, -1)
        yield batch["patch_id"].to_pylist(), unit_length(vectors)


def farthest_first(vectors: np.ndarray, count: int, first: int) -> list[int]:
    """Indices of ``count`` rows of ``(n, d)``: ``first``, then again and again the one farthest from all before.

    The greedy choice of k-center (Gonzalez 1985).
    """
    chosen = [first]
    distance = np.full(len(vectors), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, np.linalg.norm(vectors - vectors[chosen[-1]], axis=1))
        distance[chosen] = -1  # equal rows must not be taken twice
        chosen.append(int(distance.argmax()))
    return chosen


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Rows of ``(n, d)`` scaled to length 1, ``float32``; embeddings are never zero."""
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def choose(select: Select, psnr: np.ndarray, target: np.ndarray, similarity: np.ndarray, count: int) -> np.ndarray:
    """Pick ``count`` of n candidates of a pseudo-label.

    ``none`` takes the first. ``psnr_bic`` takes one for each of ``count`` evenly spaced quantiles of ``target``.
    ``psnr_bic_and_coverage`` first brings together several candidates for each quantile, sqrt(n / count) of them, so
    that half of the choice (in bits) is left to coverage, and of each such group keeps the one that adds most of it.

    Args:
        psnr: PSNR_bic of the candidates, dB ``(n,)``, n >= count; ``target``: of the real patches ``(m,)``.
        similarity: cosines of real embeddings to the candidates' ``(R, n)``.

    Returns:
        Indices of candidates, ascending ``(count,)``.
    """
    if select == "none":
        return np.arange(count)
    if select == "psnr_bic":
        return np.sort(quantile_groups(psnr, target, count, 1)[:, 0])
    groups = quantile_groups(psnr, target, count, max(1, round((len(psnr) / count) ** 0.5)))
    return np.sort(most_covering(similarity, groups))


def quantile_groups(psnr: np.ndarray, target: np.ndarray, count: int, size: int) -> np.ndarray:
    """For each of ``count`` quantiles (i + 1/2) / count of ``target`` the ``size`` candidates that stand for it.

    Candidates and quantiles (each of them ``size`` times) are matched one to one at the least total distance.

    Returns:
        Indices ``int (count, size)``, none twice, of rising PSNR_bic.
    """
    from scipy.optimize import linear_sum_assignment

    wanted = np.quantile(target, (np.arange(count) + 0.5) / count).repeat(size)
    matched = linear_sum_assignment(np.abs(wanted[:, None] - psnr[None, :]))[1]
    # Many matchings are equally near where all candidates lie on one side; the one in order of size is among the best.
    return np.asarray(matched[np.argsort(psnr[matched], kind="stable")].reshape(count, size))


def most_covering(similarity: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """One candidate of each group, greedily by facility location: whichever raises coverage most comes next.

    Greedy choice under such a constraint reaches at least half of the best coverage (Fisher, Nemhauser & Wolsey 1978).
    Where two add the same, the one that is more like some real patch is taken.

    Args:
        similarity: cosines of real embeddings to the candidates' ``(R, n)``; ``groups``: candidates ``(g, size)``.

    Returns:
        Indices of candidates, in the order of choice ``(g,)``.
    """
    pool = groups.ravel()
    group_of = np.arange(len(groups)).repeat(groups.shape[1])
    to_pool = similarity[:, pool]
    realism = 1e-6 * to_pool.max(0)
    covered = np.full(len(similarity), -1.0, np.float32)
    open_ = np.ones(len(pool), bool)
    chosen = []
    for _ in range(len(groups)):
        gain = np.maximum(to_pool - covered[:, None], 0).mean(0) + realism
        best = int(np.where(open_, gain, -np.inf).argmax())
        chosen.append(pool[best])
        covered = np.maximum(covered, to_pool[:, best])
        open_ &= group_of != group_of[best]
    return np.array(chosen)


def score(chosen: np.ndarray, psnr: np.ndarray, target: np.ndarray, similarity: np.ndarray) -> Scores:
    """Of the candidates ``chosen``; the rest as in `choose`."""
    from scipy.stats import wasserstein_distance

    coverage = float(similarity[:, chosen].max(1).mean())
    return Scores(float(wasserstein_distance(psnr[chosen], target)), coverage)


def random_score(count: int, psnr: np.ndarray, target: np.ndarray, similarity: np.ndarray, seed: int) -> Scores:
    """What ``count`` candidates picked at random score, on average."""
    random = np.random.default_rng(seed)
    draws = [score(random.permutation(len(psnr))[:count], psnr, target, similarity) for _ in range(RANDOM_DRAWS)]
    return Scores(
        float(np.mean([draw.psnr_bic_wasserstein_db for draw in draws])), float(np.mean([draw.coverage for draw in draws]))
    )
