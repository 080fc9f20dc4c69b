"""Search the patches of a run for those nearest to an image, to words, or to any vector of the same network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as ds
import torch

from ddsr_core.errors import ConfigError, InputError
from ddsr_core.imaging.decode import decode_rgb, read_rgb
from ddsr_core.pseudo_labels.config import EmbeddingsConfig
from ddsr_core.pseudo_labels.embedders import EmbedsTexts, embed_images, finish_vectors, load_embedder
from ddsr_core.pseudo_labels.names import EMBEDDERS, text_embedders
from ddsr_core.storage.vector_table import open_table


@dataclass(frozen=True)
class Hit:
    """One patch of the result.

    Attributes:
        patch_id: of the patch.
        photo: name of the photo that it was cut from.
        psnr_bic: of the patch, dB.
        cosine: similarity to the query, -1 to 1.
        pseudo_label: its cluster; None if the table is that of the embeddings stage.
    """

    patch_id: str
    photo: str
    psnr_bic: float
    cosine: float
    pseudo_label: int | None = None


def search(table_dir: Path, query_vector: np.ndarray, k: int = 12) -> list[Hit]:
    """The ``k`` patches with the highest cosine to the query, best first, by an exact search.

    Args:
        table_dir: an embeddings or clusters artifact.
        query_vector: ``float (d,)`` from the network that made the table; only its direction matters.
        k: number of patches to return.

    Raises:
        InputError: there is no table, or the vector has another size, is zero or is not finite.
    """
    table = open_table(table_dir)
    query = np.asarray(query_vector, dtype=np.float32).ravel()
    size = table.schema.field("vector").type.list_size
    if len(query) != size:
        raise InputError(
            f"the query has {len(query)} numbers, the table's vectors have {size}",
            where=table_dir,
            fix="embed the query with the backend of the run (ddsr_core.pseudo_labels.embeddings.read_config)",
        )
    if not np.isfinite(query).all() or not query.any():
        raise InputError("the query vector is zero or not finite", fix="search with another image or text")
    rows = table.search(query).distance_type("cosine").limit(k).to_list()
    hits = [
        Hit(row["patch_id"], row["photo"], row["psnr_bic"], 1 - row["_distance"], row.get("pseudo_label")) for row in rows
    ]
    return sorted(hits, key=lambda hit: (-hit.cosine, hit.patch_id))


def image_query(image: Path, config: EmbeddingsConfig, device: str = "cpu") -> np.ndarray:
    """The vector ``float32 (d,)`` of an image file, for `search` in a table made with ``config``.

    Raises:
        InputError: the file is not a readable image.
        MissingWeightsError: the network's weights are not installed.
    """
    pixels = read_rgb(image)
    vectors: np.ndarray = embed_images(pixels[None], load_embedder(config, device), config, [str(image)])
    return vectors.reshape(-1)


def text_query(text: str, config: EmbeddingsConfig, device: str = "cpu") -> np.ndarray:
    """The vector ``float32 (d,)`` of words, for `search` in a table made with ``config``.

    Raises:
        ConfigError: the network cannot embed text.
        MissingWeightsError: the network's weights are not installed.
    """
    if not EMBEDDERS[config.backend].embeds_texts:
        raise ConfigError(
            f"{config.backend} embeddings cannot be searched by words",
            where="embeddings.backend",
            fix=f"search with --image FILE, or run the pipeline with embeddings.backend={text_embedders()}",
        )
    embedder = load_embedder(config, device)
    assert isinstance(embedder, EmbedsTexts)
    with torch.inference_mode():
        vectors = embedder.embed_texts([text]).cpu().numpy()
    return finish_vectors(vectors, config.normalize, [text]).reshape(-1)


def read_patches(patches: Path, patch_ids: Sequence[str]) -> list[np.ndarray]:
    """Patches of a patches artifact by their ids, ``uint8 (H, W, 3)`` each, in the order of ``patch_ids``.

    Raises:
        InputError: the artifact lacks one of them.
    """
    dataset = ds.dataset(sorted(str(file) for file in Path(patches).glob("patches-*.parquet")))
    rows = dataset.to_table(["patch_id", "image"], filter=pc.field("patch_id").isin(list(patch_ids))).to_pylist()
    data = {row["patch_id"]: row["image"]["bytes"] for row in rows}
    missing = [name for name in patch_ids if name not in data]
    if missing:
        raise InputError(
            f"{len(missing)} patches are not in this artifact, such as {missing[0]}",
            where=patches,
            fix="use the patches that the embeddings were made from",
        )
    return [decode_rgb(data[name], name) for name in patch_ids]
