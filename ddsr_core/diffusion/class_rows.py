"""Initial rows of the class table for the pseudo-labels: those of the base model's classes nearest to their clusters.

A base model made by `ddsr pretrain` has classes that are k-means clusters of its own training patches in VGG16 features,
and knows their centers. The patches of a cluster are assigned to these centers, and the cluster starts at the mean of the
rows of the classes that most of its patches, and fewer of the other clusters' patches, are assigned to
(``finetune.class_row_init="nearest_classes"``).

Where classes have names instead, such as ImageNet's, a cluster's centroid in CLIP's image space is compared with class
names ("a photo of a tench") in the text space beside it. The mean of the rows of the nearest classes is a better
initialization than rows 0 to k-1, which are fishes (``finetune.class_row_init="clip_nearest"``).

Neither the paper nor its code does this; both are our options.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ddsr_core.config import Runtime
from ddsr_core.diffusion.base import load_base_facts, load_class_centers, read_info
from ddsr_core.diffusion.config import ClassRowsConfig
from ddsr_core.diffusion.latents import batches_of_patches
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.imaging.images import to_float
from ddsr_core.pseudo_labels.clusters import read_labels
from ddsr_core.pseudo_labels.embedders import EmbedsTexts, load_embedder
from ddsr_core.pseudo_labels.names import EMBEDDERS, text_embedders
from ddsr_core.pseudo_labels.patch_features import BATCH, PatchFeatures, nearest_class
from ddsr_core.storage.files import write_json
from ddsr_core.storage.stage import Stage, StageResult

#: Names embedded per forward pass.
TEXT_BATCH = 100
#: Decimals of the weights in ``rows.json``.
WEIGHT_DIGITS = 6


def run(
    config: ClassRowsConfig,
    *,
    clusters: Path,
    base: Path,
    out: Path,
    runtime: Runtime,
    patches: Path | None = None,
    weights: Path | None = None,
) -> StageResult:
    """Write ``rows.json``: for each pseudo-label the rows of the class table to average, and their weights.

    Args:
        patches: artifact of the patches, if clusters are compared with class centers.
        weights: weights file of the embeddings, if one is named.

    Raises:
        ConfigError: the feature network has no text tower.
        InputError: the classes of the base model have no names, or no centers.
    """
    if config.by == "centers":
        shares = class_shares(config, clusters, base, patches, runtime)
        nearest = {label: heaviest(of_label, config.nearest) for label, of_label in distinctive(shares).items()}
        covered = {label: round(sum(shares[label][row] for row in rows), 4) for label, rows in nearest.items()}
        write_json(out / "rows.json", {**_rows_json(nearest), "shares_of_patches": covered})
        return StageResult({"by": "centers", "nearest": {str(label): list(rows)[:3] for label, rows in nearest.items()}})
    by_name, described = rows_by_name(config, clusters, base, runtime, weights)
    write_json(out / "rows.json", {**_rows_json(by_name), "names": described})
    return StageResult({"by": "names", "nearest": {label: words[:3] for label, words in described.items()}})


def _rows_json(nearest: dict[int, dict[int, float]]) -> dict[str, dict[str, list[float]]]:
    return {
        "rows": {str(label): list(rows) for label, rows in nearest.items()},
        "weights": {
            str(label): [round(weight, WEIGHT_DIGITS) for weight in rows.values()] for label, rows in nearest.items()
        },
    }


def class_shares(
    config: ClassRowsConfig, clusters: Path, base: Path, patches: Path | None, runtime: Runtime
) -> dict[int, dict[int, float]]:
    """Pseudo-label -> class -> share of the cluster's patches that are nearest to the center of that class, by cosine.

    The center of a class of all sorts of patches is short. By Euclidean distance it is the nearest one for most patches that
    are unlike the base model's own: on the demo's photos, for 55 % to 99 % of every cluster.

    Raises:
        InputError: the base model has no class centers, or the patches are missing or of another size.
    """
    centers, side = F.normalize(load_class_centers(base), dim=1), read_info(base).image_px
    if patches is None:
        raise InputError("class centers are compared with patches", where="patches", fix="give the patches artifact")
    labels = read_labels(clusters)
    chosen = sampled_patches(labels, config.patches_per_cluster)
    features = PatchFeatures(side, grid=side // 8)
    counts: dict[int, Counter[int]] = {label: Counter() for label in sorted(set(labels.values()))}
    with runtime.progress("Comparing clusters with the base's classes", total=len(chosen), unit="patches") as bar:
        for names, pixels in batches_of_patches(patches, side, BATCH):
            kept = [index for index, name in enumerate(names) if name in chosen]
            if kept:
                classes = nearest_class(features.vectors(to_float(pixels[kept])), centers)
                for index, row in zip(kept, classes.tolist(), strict=True):
                    counts[labels[names[index]]][row] += 1
            bar.advance(len(kept))
    return {label: {row: n / found.total() for row, n in found.items()} for label, found in counts.items()}


def distinctive(shares: dict[int, dict[int, float]]) -> dict[int, dict[int, float]]:
    """Pseudo-label -> class -> its share times the ratio of that share to its mean over the pseudo-labels.

    A class that every cluster has many patches of would give all of them the same initial row.

    >>> distinctive({0: {7: 0.5, 8: 0.5}, 1: {7: 1.0}})
    {0: {7: 0.3333333333333333, 8: 1.0}, 1: {7: 1.3333333333333333}}
    """
    mean: defaultdict[int, float] = defaultdict(float)
    for of_label in shares.values():
        for row, share in of_label.items():
            mean[row] += share / len(shares)
    return {label: {row: share**2 / mean[row] for row, share in of_label.items()} for label, of_label in shares.items()}


def sampled_patches(labels: dict[str, int], most: int) -> set[str]:
    """At most ``most`` patches of each pseudo-label, chosen at random; the same ones every time."""
    ids, of_patch = np.array(list(labels)), np.array(list(labels.values()))
    random = np.random.default_rng(0)
    chosen = [random.permutation(np.flatnonzero(of_patch == label))[:most] for label in np.unique(of_patch)]
    return {str(name) for name in ids[np.concatenate(chosen)]}


def heaviest(shares: dict[int, float], count: int) -> dict[int, float]:
    """The ``count`` classes with the largest shares, scaled to sum 1; of equal ones the lower class first.

    >>> heaviest({4: 0.25, 2: 0.5, 9: 0.25}, 2)
    {2: 0.6666666666666666, 4: 0.3333333333333333}
    """
    kept = sorted(shares, key=lambda row: (-shares[row], row))[:count]
    total = sum(shares[row] for row in kept)
    return {row: shares[row] / total for row in kept}


def rows_by_name(
    config: ClassRowsConfig, clusters: Path, base: Path, runtime: Runtime, weights: Path | None
) -> tuple[dict[int, dict[int, float]], dict[str, list[str]]]:
    """Pseudo-label -> row -> weight of the classes whose names are nearest, and pseudo-label -> these names.

    Raises:
        ConfigError: the feature network has no text tower.
        InputError: the classes of the base model have no names.
    """
    if not EMBEDDERS[config.embeddings.backend].embeds_texts:
        raise ConfigError(
            f"{config.embeddings.backend} has no text tower to compare class names with",
            where="finetune.class_row_init",
            fix=f"set embeddings.backend={text_embedders()}, or finetune.class_row_init=null",
        )
    names = class_names(base)
    texts = embed_names(config, list(names.values()), runtime.device, weights)
    nearest = nearest_rows(np.load(clusters / "centroids.npy"), texts, config.nearest)
    table = list(names)
    rows = {label: [table[index] for index in chosen] for label, chosen in enumerate(nearest)}
    described = {str(label): [names[row] for row in chosen] for label, chosen in rows.items()}
    return {label: dict.fromkeys(chosen, 1 / len(chosen)) for label, chosen in rows.items()}, described


def class_names(base: Path) -> dict[int, str]:
    """Row of the class table -> name: the base model's own names, or ImageNet's for a table of 1000 classes.

    Raises:
        InputError: neither applies.
    """
    classes, names = load_base_facts(base)
    if names:
        return names
    if classes == 1000:
        from torchvision.models import ResNet18_Weights  # a second to import, for names that few bases lack

        return dict(enumerate(ResNet18_Weights.IMAGENET1K_V1.meta["categories"]))
    raise InputError(
        f"the {classes} classes of this base have no names",
        where=base,
        fix="set finetune.class_row_init to auto, null or imagenet_rows",
    )


@torch.inference_mode()
def embed_names(config: ClassRowsConfig, names: list[str], device: str, weights: Path | None) -> np.ndarray:
    """Text embeddings ``float32 (len(names), d)``, of length 1."""
    embedder = load_embedder(config.embeddings, device, weights)
    assert isinstance(embedder, EmbedsTexts)
    texts = [config.prompt.format(name.partition(",")[0]) for name in names]  # "tench, Tinca tinca": the common name
    starts = range(0, len(texts), TEXT_BATCH)
    vectors = torch.cat([embedder.embed_texts(texts[start : start + TEXT_BATCH]) for start in starts])
    return unit_rows(vectors.float().cpu().numpy())


def nearest_rows(centroids: np.ndarray, texts: np.ndarray, count: int) -> np.ndarray:
    """For each centroid ``(k, d)`` the indices ``(k, count)`` of the texts ``(n, d)`` with the highest cosine similarity.

    Both sets are centered first: images and texts lie in two cones of CLIP's space, and what all vectors of a cone share
    would make the same few names nearest to every cluster.
    """
    images, words = unit_rows(centroids) - unit_rows(centroids).mean(0), unit_rows(texts) - unit_rows(texts).mean(0)
    cosine = unit_rows(images) @ unit_rows(words).T
    return np.argsort(-cosine, axis=1, kind="stable")[:, :count]


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows of ``(n, d)`` scaled to length 1; zero rows stay zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), dtype=np.float32)


STAGE = Stage("class_rows", version=3, run=run, config=ClassRowsConfig, section="II-B", words="class rows of a base model")
