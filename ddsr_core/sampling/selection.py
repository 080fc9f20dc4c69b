"""Selection: compare samples with the accepted patches, and choose among them.

The images selected should be distributed as the accepted patches of their pseudo-label are: the same histogram of PSNR_bic
and the same region of embedding space. Selecting the lowest PSNR_bic would select artifacts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from scipy.stats import wasserstein_distance
from torch import Tensor

from ddsr_core.config import Runtime
from ddsr_core.diffusion.latents import batches_of_patches
from ddsr_core.diffusion.training_set import label_of
from ddsr_core.errors import InputError
from ddsr_core.imaging.bicubic import psnr_bic
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.images import to_float
from ddsr_core.imaging.kernel import SCALE
from ddsr_core.pseudo_labels.clusters import read_labels
from ddsr_core.pseudo_labels.embedders import embed_images, load_embedder
from ddsr_core.pseudo_labels.embeddings import read_config
from ddsr_core.sampling.config import Select
from ddsr_core.storage.vector_table import open_table

THUMBNAIL_PX = 32
COMPARE_BATCH = 32
VECTOR_BATCH = 1024
#: Real vectors per pseudo-label that coverage is measured on; a random subset if there are more.
COVERAGE_SAMPLE = 2000
#: Random selections of the same size that a selection is compared with.
RANDOM_DRAWS = 20


@dataclass(frozen=True)
class References:
    """Artifacts of the real patches that samples are compared with.

    Attributes:
        weights: open_clip weights file, if the embeddings were made with one.
    """

    patches: Path
    clusters: Path
    embeddings: Path
    weights: Path | None = None


class Nearest:
    """For each of ``count`` candidates the most similar training patch so far.

    Attributes:
        cosine: similarity to it ``(count,)``, at most 1; ``patch_id``: its id.
    """

    def __init__(self, count: int) -> None:
        self.cosine = np.full(count, -np.inf, np.float32)
        self.patch_id = [""] * count

    def update(self, cosine: np.ndarray, names: Sequence[str]) -> None:
        """Take further patches into account: ``cosine (count, len(names))``."""
        winner = cosine.argmax(1)
        best = np.minimum(cosine.max(1), 1)  # rounding must not push a cosine above 1
        for index in np.flatnonzero(best > self.cosine):
            self.cosine[index], self.patch_id[index] = best[index], names[winner[index]]


@dataclass(frozen=True)
class Comparison:
    """Candidates and accepted patches side by side. PSNR_bic with the antialiased kernel, dB; vectors of length 1.

    Attributes:
        psnr_bic: of the candidates ``(n,)``; ``vectors``: their embeddings ``(n, d)``.
        by_pixels, by_embedding: the training patch that each candidate is most similar to.
        nearest_label: pseudo-label of the one that is most similar by embedding ``(n,)``.
        real_psnr_bic: of the accepted patches ``(N,)``; ``real_labels``: their pseudo-labels ``(N,)``.
        real_vectors: for each pseudo-label embeddings of its patches ``(at most COVERAGE_SAMPLE, d)``.
    """

    psnr_bic: np.ndarray
    vectors: np.ndarray
    by_pixels: Nearest
    by_embedding: Nearest
    nearest_label: np.ndarray
    real_psnr_bic: np.ndarray
    real_labels: np.ndarray
    real_vectors: list[np.ndarray]


@dataclass(frozen=True)
class Scores:
    """How well a selection represents a pseudo-label's real patches.

    Attributes:
        psnr_bic_wasserstein_db: Wasserstein-1 distance between the PSNR_bic of the two, dB; 0 is best.
        coverage: mean over the real vectors of the largest cosine to a selected one; 1 is best.
    """

    psnr_bic_wasserstein_db: float
    coverage: float


def thumbnail_vectors(images: Tensor) -> np.ndarray:
    """Vectors for similarity by pixels: 32-px thumbnails, without their mean, of length 1.

    Args:
        images: ``float (B, 3, H, W)`` in [0, 1].

    Returns:
        ``float32 (B, 3072)``; the dot product of two is their cosine similarity, 1 for a copy.
    """
    small = F.interpolate(images, size=(THUMBNAIL_PX, THUMBNAIL_PX), mode="area").flatten(1)
    return F.normalize(small - small.mean(1, keepdim=True), dim=1).cpu().numpy()


def compare(candidates: list[Path], references: References, runtime: Runtime, scale: int = SCALE) -> Comparison:
    """Describe candidates and patches in the same way, and find the nearest patch of each candidate by pixels and embedding.

    Patches and their vectors are read one batch at a time. What stays in memory is the id, pseudo-label and PSNR_bic of each
    patch, and `COVERAGE_SAMPLE` vectors per pseudo-label.

    Args:
        candidates: PNG files, all of one size.
        scale: of PSNR_bic.

    Raises:
        InputError: the artifacts do not belong together.
    """
    of_patch = read_labels(references.clusters)
    samples = _describe(candidates, references, runtime, scale)
    by_pixels = Nearest(len(candidates))
    real_psnr: list[float] = []
    real_labels: list[int] = []
    with runtime.progress("Comparing with real patches", total=len(of_patch), unit="patches") as bar:
        for names, pixels in batches_of_patches(references.patches, samples.side_px):
            real = to_float(pixels)
            real_psnr += psnr_bic(real, scale=scale).tolist()
            real_labels += [label_of(of_patch, name) for name in names]
            by_pixels.update((samples.thumbnails @ thumbnail_vectors(real).T).max(0), names)
            bar.advance(len(names))
    by_embedding, real_vectors = _compare_vectors(samples.vectors, references.embeddings, of_patch)
    return Comparison(
        psnr_bic=samples.psnr_bic, vectors=samples.vectors, by_pixels=by_pixels, by_embedding=by_embedding,
        nearest_label=np.array([of_patch[name] for name in by_embedding.patch_id]), real_psnr_bic=np.array(real_psnr),
        real_labels=np.array(real_labels), real_vectors=real_vectors,
    )  # fmt: skip


def _compare_vectors(vectors: np.ndarray, embeddings: Path, of_patch: Mapping[str, int]) -> tuple[Nearest, list[np.ndarray]]:
    """The nearest patch of each of ``vectors (n, d)``; for each pseudo-label the vectors that coverage is measured on."""
    nearest, measured = Nearest(len(vectors)), _coverage_patches(of_patch)
    of_label: dict[int, list[np.ndarray]] = {label: [] for label in measured.values()}
    for names, batch in _stored_vectors(embeddings):
        nearest.update(vectors @ batch.T, names)
        for name, vector in zip(names, batch, strict=True):
            if name in measured:
                of_label[measured[name]].append(vector)
    if sum(map(len, of_label.values())) != len(measured):
        raise InputError(
            "patches of the clusters have no embedding", where=embeddings, fix="give the embeddings that were clustered"
        )
    return nearest, [np.stack(of_label[label]) for label in sorted(of_label)]


@dataclass(frozen=True)
class _Samples:
    """PSNR_bic ``(n,)``, thumbnails as they are and mirrored ``(2, n, 3072)``, embeddings ``(n, d)``, side in pixels."""

    psnr_bic: np.ndarray
    thumbnails: np.ndarray
    vectors: np.ndarray
    side_px: int


def _describe(candidates: list[Path], references: References, runtime: Runtime, scale: int) -> _Samples:
    config = read_config(references.embeddings)
    embedder = load_embedder(config, runtime.device, references.weights)
    psnr: list[float] = []
    thumbnails, vectors = [], []
    with runtime.progress("Describing the samples", total=len(candidates), unit="images") as bar:
        for start in range(0, len(candidates), COMPARE_BATCH):
            paths = candidates[start : start + COMPARE_BATCH]
            pixels = np.stack([read_rgb(path) for path in paths])
            images = to_float(pixels)
            psnr += psnr_bic(images, scale=scale).tolist()
            thumbnails.append(np.stack([thumbnail_vectors(images), thumbnail_vectors(images.flip(3))]))
            vectors.append(unit_length(embed_images(pixels, embedder, config, [path.name for path in paths])))
            bar.advance(len(paths))
    return _Samples(np.array(psnr), np.concatenate(thumbnails, axis=1), np.concatenate(vectors), pixels.shape[1])


def _coverage_patches(of_patch: Mapping[str, int]) -> dict[str, int]:
    """Ids and pseudo-labels of the patches that coverage is measured on; the same ones for every set of samples."""
    ids, labels = np.array(list(of_patch)), np.array(list(of_patch.values()))
    random = np.random.default_rng(0)
    chosen = [random.permutation(np.flatnonzero(labels == label))[:COVERAGE_SAMPLE] for label in np.unique(labels)]
    return {str(ids[index]): int(labels[index]) for index in np.concatenate(chosen)}


def _stored_vectors(embeddings: Path) -> Iterator[tuple[list[str], np.ndarray]]:
    """Patch ids and unit vectors ``float32 (n, d)`` of an embeddings artifact, `VECTOR_BATCH` at a time."""
    for batch in open_table(embeddings).search().select(["patch_id", "vector"]).to_batches(VECTOR_BATCH):
        vectors = batch["vector"].flatten().to_numpy().reshape(batch.num_rows, -1)
        yield batch["patch_id"].to_pylist(), unit_length(vectors)


def farthest_first(vectors: np.ndarray, count: int, first: int) -> list[int]:
    """Indices of ``count`` rows of ``(n, d)``: ``first``, then repeatedly the one farthest from all before.

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


def own_cluster_first(own: np.ndarray, similarity: np.ndarray, at_least: int) -> np.ndarray:
    """The candidates of a pseudo-label that resemble its cluster.

    Args:
        own: whether the patch nearest to a candidate has its pseudo-label, ``bool (n,)``.
        similarity: largest cosine to a patch with its pseudo-label ``(n,)``.
        at_least: how many are wanted; if fewer are ``own``, the most similar ones of the others are added.

    Returns:
        Indices, ascending.
    """
    order = np.lexsort((-similarity, ~own))
    return np.sort(order[: max(at_least, int(own.sum()))])


def choose(select: Select, psnr: np.ndarray, target: np.ndarray, similarity: np.ndarray, count: int) -> np.ndarray:
    """Select ``count`` of n candidates of a pseudo-label.

    ``none`` takes the first. ``psnr_bic`` takes one for each of ``count`` evenly spaced quantiles of ``target``.
    ``psnr_bic_and_coverage`` first groups sqrt(n / count) candidates for each quantile, so that half of the choice (in bits)
    is left to coverage, and takes from each group the candidate that adds most coverage.

    Args:
        psnr: PSNR_bic of the candidates, dB ``(n,)``, n >= count; ``target``: of the real patches ``(m,)``.
        similarity: cosines of real embeddings to the candidates' ``(R, n)``.

    Returns:
        Indices of candidates, ascending ``(count,)``.

    Raises:
        ValueError: unknown ``select``.
    """
    if select == "none":
        return np.arange(count)
    if select == "psnr_bic":
        return np.sort(quantile_groups(psnr, target, count, 1)[:, 0])
    if select != "psnr_bic_and_coverage":
        raise ValueError(f"unknown selection: {select}")
    groups = quantile_groups(psnr, target, count, max(1, round((len(psnr) / count) ** 0.5)))
    return np.sort(most_covering(similarity, groups))


def quantile_groups(psnr: np.ndarray, target: np.ndarray, count: int, size: int) -> np.ndarray:
    """For each of ``count`` quantiles (i + 1/2) / count of ``target`` the ``size`` candidates that represent it.

    Candidates and quantiles (each repeated ``size`` times) are matched one to one with the smallest total distance.

    Returns:
        Indices ``int (count, size)`` without repetition, in order of PSNR_bic.
    """
    wanted = np.quantile(target, (np.arange(count) + 0.5) / count).repeat(size)
    matched = linear_sum_assignment(np.abs(wanted[:, None] - psnr[None, :]))[1]
    # Many matchings are equally close if all candidates lie on one side; the one in order of size is among the best.
    return np.asarray(matched[np.argsort(psnr[matched], kind="stable")].reshape(count, size))


def most_covering(similarity: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """One candidate of each group, greedily by facility location: the one that raises coverage most comes next.

    Greedy selection under such a constraint reaches at least half of the best coverage (Fisher, Nemhauser & Wolsey 1978).
    If two add the same, the one that is more similar to some real patch is taken.

    Args:
        similarity: cosines of real embeddings to the candidates' ``(R, n)``; ``groups``: candidates ``(g, size)``.

    Returns:
        Indices of candidates, in the order of selection ``(g,)``.
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
    """Scores of the candidates ``chosen``; the other arguments as in `choose`."""
    coverage = float(similarity[:, chosen].max(1).mean())
    return Scores(float(wasserstein_distance(psnr[chosen], target)), coverage)


def random_score(count: int, psnr: np.ndarray, target: np.ndarray, similarity: np.ndarray, seed: int) -> Scores:
    """Mean scores of `RANDOM_DRAWS` random selections of ``count`` candidates."""
    random = np.random.default_rng(seed)
    draws = [score(random.permutation(len(psnr))[:count], psnr, target, similarity) for _ in range(RANDOM_DRAWS)]
    return Scores(
        float(np.mean([draw.psnr_bic_wasserstein_db for draw in draws])), float(np.mean([draw.coverage for draw in draws]))
    )
