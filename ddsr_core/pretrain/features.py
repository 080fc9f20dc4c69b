"""VGG16 features of the training patches, their k-means classes, and the token maps that the prior is aligned with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from ddsr_core.progress import ProgressFactory, silent
from ddsr_core.pseudo_labels.patch_features import BATCH, PatchFeatures

#: Patches that the principal components of the token maps are computed from.
PCA_PATCHES = 2_000


def batches(patches: np.ndarray) -> Iterator[tuple[slice, Tensor]]:
    """``uint8 (N, px, px, 3)`` in batches of ``float (B, 3, px, px)`` in [0, 1], each with its place."""
    for start in range(0, len(patches), BATCH):
        place = slice(start, min(start + BATCH, len(patches)))
        yield place, torch.from_numpy(np.array(patches[place])).permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class TokenBasis:
    """Principal components of token maps.

    Attributes:
        mean: ``(512,)``.
        components: ``(512, dims)``, orthonormal columns.
    """

    mean: Tensor
    components: Tensor

    @classmethod
    def of(cls, features: PatchFeatures, patches: np.ndarray, dims: int) -> TokenBasis:
        """From the first patches (which are in random order)."""
        maps = torch.cat([features(images)[1].flatten(0, 1) for _, images in batches(patches[:PCA_PATCHES])])
        mean = maps.mean(0)
        centered = (maps - mean).double()
        vectors = torch.linalg.eigh(centered.T @ centered).eigenvectors.flip(1)[:, :dims]
        signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()  # eigenvectors are unique up to their sign
        return cls(mean, (vectors * signs).float())

    def project(self, maps: Tensor) -> Tensor:
        """``(B, N, 512)`` to ``(B, N, dims)``."""
        return (maps - self.mean) @ self.components


def describe(
    patches: np.ndarray, features: PatchFeatures, dims: int, progress: ProgressFactory = silent
) -> tuple[Tensor, Tensor]:
    """Vectors ``float32 (N, 512)`` of all patches and, if ``dims`` > 0, token maps ``float16 (N, grid * grid, dims)``."""
    basis = TokenBasis.of(features, patches, dims) if dims else None
    vectors = torch.empty(len(patches), 512)
    tokens = torch.empty(len(patches), features.grid**2, dims, dtype=torch.float16)
    with progress("Describing patches", total=len(patches), unit="patches") as bar:
        for place, images in batches(patches):
            vectors[place], maps = features(images)
            if basis:
                tokens[place] = basis.project(maps).half()
            bar.advance(len(images))
    return vectors, tokens


def make_classes(vectors: Tensor, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """k-means: the class of each vector ``int64 (N,)`` and the centers ``float32 (classes, 512)``."""
    kmeans = MiniBatchKMeans(classes, random_state=seed, n_init=3, batch_size=4096)
    labels = kmeans.fit_predict(vectors.numpy())
    return torch.from_numpy(labels).long(), torch.from_numpy(kmeans.cluster_centers_).float()
