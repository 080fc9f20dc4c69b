"""How alike two sets of images are, by their feature vectors: Frechet distance, precision and recall."""

from __future__ import annotations

import torch
from torch import Tensor

#: Neighbors that span the manifold of precision and recall (Kynkäänniemi et al. 2019).
NEIGHBORS = 5


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Frechet distance of two feature clouds ``(n, d)`` and ``(m, d)``, each taken as a Gaussian.

    With n below a few thousand it has a bias: compare only distances of equal counts.
    """
    mean = (one.double().mean(0) - other.double().mean(0)).square().sum()
    first, second = one.double().T.cov(), other.double().T.cov()
    values, vectors = torch.linalg.eigh(first)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return float(mean + first.trace() + second.trace() - 2 * cross)


def precision_recall(real: Tensor, drawn: Tensor, neighbors: int = NEIGHBORS) -> tuple[float, float]:
    """Improved precision and recall of two feature clouds (Kynkäänniemi et al. 2019).

    Precision: share of sampled images within reach of a real one. Recall: share of real images within reach of a
    sampled one.
    """

    def reach(cloud: Tensor) -> Tensor:
        k = min(neighbors + 1, len(cloud))  # the nearest of all is the image itself
        return torch.cdist(cloud, cloud).kthvalue(k, dim=1).values

    between = torch.cdist(real, drawn)
    precision = (between <= reach(real)[:, None]).any(0).float().mean()
    recall = (between <= reach(drawn)[None]).any(1).float().mean()
    return float(precision), float(recall)
