"""Initial rows of the class table for the pseudo-labels: those of the named classes nearest to their clusters.

A cluster's centroid lies in CLIP's image space, a class name ("a photo of a tench") in the text space beside it. The
average of the rows of the nearest classes is a better initialization than rows 0 to k-1 (fishes, for ImageNet).
Neither the paper nor its code does this; it is our option (``finetune.class_row_init="clip_nearest"``).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ddsr_core.config import Runtime
from ddsr_core.diffusion.base import load_base_facts
from ddsr_core.diffusion.config import ClassRowsConfig
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.pseudo_labels.embedders import EmbedsTexts, load_embedder
from ddsr_core.pseudo_labels.names import EMBEDDERS, text_embedders
from ddsr_core.storage.files import write_json
from ddsr_core.storage.stage import Stage, StageResult

#: Names embedded per forward pass.
TEXT_BATCH = 100


def run(
    config: ClassRowsConfig, *, clusters: Path, base: Path, out: Path, runtime: Runtime, weights: Path | None = None
) -> StageResult:
    """Write ``rows.json``: for each pseudo-label the rows of the class table to average, and the names of the classes.

    Args:
        weights: weights file of the embeddings, if one is named.

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
    rows = {str(label): [table[index] for index in chosen] for label, chosen in enumerate(nearest)}
    described = {label: [names[row] for row in chosen] for label, chosen in rows.items()}
    write_json(out / "rows.json", {"rows": rows, "names": described})
    return StageResult({"nearest": {label: words[:3] for label, words in described.items()}})


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
        fix="set finetune.class_row_init to null or imagenet_rows",
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


STAGE = Stage("class_rows", version=1, run=run, config=ClassRowsConfig, section="II-B", words="class rows of a base model")
