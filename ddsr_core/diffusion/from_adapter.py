"""Fine-tuning that continues from an earlier adapter: its pseudo-labels are matched with those of the new clusters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

from ddsr_core.diffusion.difffit import ROWS, Adapter, load_adapter
from ddsr_core.errors import InputError


def match_labels(new: np.ndarray, old: np.ndarray) -> dict[int, int]:
    """New pseudo-label -> old one, such that the squared distances between matched centroids have the smallest sum.

    Args:
        new, old: centroids ``float32 (k, d)`` of two clusterings in the same space.

    Raises:
        InputError: a different k or dimension.

    >>> match_labels(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[0.9, 0.0], [0.0, 0.8]]))
    {0: 1, 1: 0}
    """
    if new.shape != old.shape:
        raise InputError(
            f"clusters of shape {new.shape} cannot be matched with those of the earlier adapter, {old.shape}",
            where="from_clusters",
            fix="keep clusters.k and the embeddings, or fine-tune without an earlier adapter",
        )
    distances = ((new[:, None].astype(np.float64) - old[None].astype(np.float64)) ** 2).sum(-1)
    rows, columns = linear_sum_assignment(distances)
    return {int(row): int(column) for row, column in zip(rows, columns, strict=True)}


def load_for_labels(from_adapter: Path, from_clusters: Path, clusters: Path, label_map: dict[int, int]) -> Adapter:
    """An earlier averaged adapter with its class rows in the order of the new pseudo-labels.

    Args:
        from_adapter: `finetune` artifact to continue from; ``from_clusters``: the clusters that it was made with.
        clusters: the new clusters; ``label_map``: their pseudo-labels' rows of the class table.

    Raises:
        InputError: ``from_adapter`` holds no adapter, or the clusters cannot be matched.
    """
    adapter = load_adapter(from_adapter)
    old_of = match_labels(np.load(clusters / "centroids.npy"), np.load(from_clusters / "centroids.npy"))
    place = {label: index for index, label in enumerate(sorted(adapter.label_map))}
    order = [place[old_of[label]] for label in sorted(label_map)] + [len(place)]  # the null row stays last
    tensors = {**adapter.tensors, ROWS: adapter.tensors[ROWS][order]}
    return Adapter(tensors, label_map, adapter.base_digest, adapter.gamma_blocks)
