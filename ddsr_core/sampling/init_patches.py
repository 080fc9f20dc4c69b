"""Sampling that starts from noised real patches: each cluster's modes, or patches that are spread over it.

The patch nearest to a centroid is the cluster's medoid, its mode in embedding space. Medoids are typical and alike;
k-center patches differ from each other as much as the cluster allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ddsr_core.diffusion.base import Base
from ddsr_core.diffusion.latents import open_latents
from ddsr_core.errors import InputError
from ddsr_core.sampling.config import InitPatches
from ddsr_core.sampling.selection import farthest_first
from ddsr_core.storage.vector_table import read_table


def init_patches(labels: np.ndarray, clusters: Path, order: InitPatches = "medoids") -> list[str]:
    """For each candidate the id of the patch that it starts from.

    The j-th candidate of a pseudo-label starts from its j-th patch; after the last patch the first follows again.

    Args:
        labels: pseudo-labels of the candidates ``(n,)``.
        clusters: artifact of the clusters stage.
        order: ``medoids``: by distance to the centroid; ``k-center``: the medoid, then always the patch whose embedding
            is farthest from all patches before it (`selection.farthest_first`).
    """
    table = pq.read_table(clusters / "labels.parquet", columns=["patch_id", "pseudo_label", "distance"])
    ids, of_patch, distances = (column.to_numpy() for column in table.columns)
    vectors = _vectors(clusters, ids) if order == "k-center" else None
    chosen = np.empty(len(labels), object)
    for label in np.unique(labels):
        members = np.flatnonzero(of_patch == label)
        members = members[np.argsort(distances[members], kind="stable")]
        candidates = np.flatnonzero(labels == label)
        if vectors is not None:
            needed = min(len(candidates), len(members))
            members = members[farthest_first(vectors[members], needed, first=0)]
        chosen[candidates] = ids[members[np.arange(len(candidates)) % len(members)]]
    return [str(name) for name in chosen]


def _vectors(clusters: Path, ids: np.ndarray) -> np.ndarray:
    """Embeddings of the patches, in the order of ``ids``."""
    table, vectors = read_table(clusters)
    row = {name: index for index, name in enumerate(table["patch_id"].to_pylist())}
    return vectors[[row[name] for name in ids]]


class InitLatents:
    """Stored latents of the patches that sampling starts from.

    Raises:
        InputError: ``latents`` is None, or belongs to another base model.
    """

    def __init__(self, model: Base, latents: Path | None) -> None:
        if latents is None:
            raise InputError(
                "sampling from real patches needs their latents",
                where="sample.strength",
                fix="give the artifact of the latents stage as input `latents`, or set sample.strength=1",
            )
        stored = open_latents(latents)
        shape = model.dit.config
        if stored.mean.shape[2:] != (shape.in_channels, shape.latent_px, shape.latent_px):
            raise InputError(f"the latents belong to another base model: {stored.mean.shape[2:]}", where=latents)
        self.folder, self.mean, self.device = latents, stored.mean[0], next(model.dit.parameters()).device
        self.row: Mapping[str, int] = {name: row for row, name in enumerate(stored.patch_ids)}

    def of(self, patch_ids: list[str]) -> Tensor:
        """``float32 (len(patch_ids), C, h, w)``, diffusion units, not mirrored.

        Raises:
            InputError: a patch has no latent.
        """
        if missing := [name for name in patch_ids if name not in self.row]:
            raise InputError(f"patch {missing[0]!r} has no latent", where=self.folder, fix="give the run's own latents")
        rows = [self.row[name] for name in patch_ids]
        return torch.from_numpy(np.stack([self.mean[row] for row in rows]).astype(np.float32)).to(self.device)
