"""How well a set of images stands for the accepted patches, in the embedding space of the run and in PSNR_bic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy.stats import wasserstein_distance

from ddsr_core.metrics.clouds import precision_recall
from ddsr_core.sampling.selection import Comparison

#: Draws of real patches that precision and recall are averaged over, and the most images of a set that take part.
DRAWS, MOST_IMAGES = 20, 1000


@dataclass(frozen=True)
class SetQuality:
    """A set of images against the accepted patches.

    Attributes:
        own_cluster_share: share of images whose nearest accepted patch, by embedding, has their pseudo-label.
        precision: share of images within reach of a real patch; recall: share of real patches within reach of an image
            (`ddsr_core.metrics.clouds.precision_recall`). As many real patches of each pseudo-label as the set has images
            of it, mean over `DRAWS` draws.
        psnr_bic_distance_db: Wasserstein-1 distance between the PSNR_bic of the set and of all accepted patches, dB.
    """

    own_cluster_share: float
    precision: float
    recall: float
    psnr_bic_distance_db: float

    def rounded(self) -> dict[str, float]:
        """As in ``summary.json``."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def set_quality(compared: Comparison, places: Sequence[int], labels: np.ndarray) -> SetQuality:
    """Quality of some of the images of a comparison.

    Args:
        places: their indices in ``compared``.
        labels: their pseudo-labels ``(len(places),)``.
    """
    psnr = compared.psnr_bic[list(places)]
    precision, recall = mean_precision_recall(compared.vectors[list(places)], labels, compared.real_vectors)
    return SetQuality(
        own_cluster_share=float((compared.nearest_label[list(places)] == labels).mean()),
        precision=precision,
        recall=recall,
        psnr_bic_distance_db=float(wasserstein_distance(psnr, compared.real_psnr_bic)),
    )


def mean_precision_recall(vectors: np.ndarray, labels: np.ndarray, real: Sequence[np.ndarray]) -> tuple[float, float]:
    """Precision and recall of ``vectors (n, d)`` against equally many real vectors with the same pseudo-labels.

    Args:
        labels: pseudo-labels of the vectors ``(n,)``.
        real: for each pseudo-label real vectors ``(m, d)``; if a label has fewer than the set, all of them.
    """
    random = np.random.default_rng(0)
    results = []
    for _ in range(DRAWS):
        kept = random.permutation(len(vectors))[:MOST_IMAGES]
        counts = np.bincount(labels[kept], minlength=len(real))
        drawn = [random.permutation(part)[:count] for part, count in zip(real, counts, strict=True)]
        results.append(precision_recall(torch.from_numpy(np.concatenate(drawn)), torch.from_numpy(vectors[kept])))
    precision, recall = np.mean(results, axis=0)
    return float(precision), float(recall)
