"""VGG16 features of training patches: vectors for classes and scores, and token maps to align the prior with.

Vectors are the average-pooled conv5_3 that the embeddings stage offers as ``vgg16``; maps are conv4_3, which has one
position for each token of the DiT at 64 pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from ddsr_core.progress import ProgressFactory, silent
from ddsr_core.pseudo_labels.embedders import IMAGENET_MEAN, IMAGENET_STD, Vgg16Embedder, prepare

#: Layers of VGG16 up to conv4_3 and its ReLU (1/8 of the image), and from there to conv5_3 and its ReLU (1/16).
MAPS_UNTIL = 23
BATCH = 128
#: Patches that the principal components of the token maps are computed from.
PCA_PATCHES = 2_000


class PatchFeatures:
    """VGG16 at the patches' own size.

    Args:
        image_px: height and width of the patches.
        grid: token maps are averaged to this many positions along each side.
    """

    def __init__(self, image_px: int, grid: int) -> None:
        network = Vgg16Embedder(image_px).eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.image_px, self.grid = image_px, grid
        self.front, self.rest = network.features[:MAPS_UNTIL], network.features[MAPS_UNTIL:]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``float (B, 3, px, px)`` in [0, 1] to vectors ``(B, 512)`` of length 1 and maps ``(B, grid * grid, 512)``."""
        x = prepare(images, self.image_px, IMAGENET_MEAN, IMAGENET_STD)
        with torch.autocast("cpu", torch.bfloat16):  # twice as fast; the vectors keep a cosine above 0.99 to the exact ones
            maps = self.front(x.contiguous(memory_format=torch.channels_last))
            vectors = self.rest(maps).float().mean((2, 3))
        maps = F.adaptive_avg_pool2d(maps.float(), self.grid).flatten(2).transpose(1, 2)
        return F.normalize(vectors, dim=1), maps

    def vectors(self, images: Tensor) -> Tensor:
        """Vectors alone, of any number of images."""
        return torch.cat([self(part)[0] for part in images.split(BATCH)])


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


def nearest_class(vectors: Tensor, centers: Tensor) -> Tensor:
    """The class ``int64 (N,)`` whose center is nearest to each vector."""
    return torch.cdist(vectors, centers).argmin(1)
