"""The networks that turn a patch into a feature vector, by name, defined nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema


@dataclass(frozen=True)
class Embedder:
    """One kind of feature network.

    Attributes:
        factory: ``module:callable``. The callable takes an `EmbeddingsConfig` and the path of a weights file, or None, and
            returns an ``nn.Module`` that maps ``(B, 3, H, W)`` in [0, 1] to ``(B, d)``.
        embeds_texts: whether the module also has a method ``embed_texts`` that maps a list of n texts to ``(n, d)``, as
            search by words and ``class_row_init=clip_nearest`` require.
        takes_weights: whether ``embeddings.weights`` may name a file. Its content then enters the keys of the stages.
    """

    factory: str
    embeds_texts: bool = False
    takes_weights: bool = False


#: Every feature network by its name in ``embeddings.backend``. A new one is a file in this folder and one line here.
EMBEDDERS: Mapping[str, Embedder] = {
    "open_clip": Embedder("ddsr_core.pseudo_labels.embedders:open_clip_embedder", embeds_texts=True, takes_weights=True),
    "vgg16": Embedder("ddsr_core.pseudo_labels.embedders:vgg16_embedder"),
}


def known_embedder(name: str) -> str:
    """The name itself.

    Raises:
        ValueError: not a name in `EMBEDDERS`.
    """
    if name not in EMBEDDERS:
        raise ValueError(f"unknown embedder {name!r}; use one of {', '.join(EMBEDDERS)}")
    return name


def text_embedders() -> str:
    """The names of networks that embed texts, for messages.

    >>> text_embedders()
    'open_clip'
    """
    return " or ".join(name for name, embedder in EMBEDDERS.items() if embedder.embeds_texts)


#: A name in `EMBEDDERS`, as a type of config fields.
EmbedderName = Annotated[
    str, AfterValidator(known_embedder), WithJsonSchema({"type": "string", "enum": list(EMBEDDERS), "title": "Embedder"})
]
