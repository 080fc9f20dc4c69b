"""The kinds of training sets of SR networks: the only place that defines them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

#: Kinds of training sets in the order of tables: baselines, ours, full sets.
TrainingSetName = Literal[
    "random", "threshold", "k-center", "hdc", "loss-ranked", "gsdd", "base", "distilled", "full", "full-thresholded"
]


@dataclass(frozen=True)
class TrainingSet:
    """One kind of training set.

    Attributes:
        name: name in configs, options, tables and ``report.json``.
        meaning: description in the legend of a table.
        whole: whether it contains all photos or patches, so that it has no number of images to be compared at.
        generated: whether a run of the pipeline generates it with a model. ``ddsr train-sr`` cannot cut such a set out of
            a folder of photos.
    """

    name: TrainingSetName
    meaning: str
    whole: bool = False
    generated: bool = False


TRAINING_SETS: Mapping[TrainingSetName, TrainingSet] = {
    kind.name: kind
    for kind in (
        TrainingSet("random", "random crops of the photos"),
        TrainingSet("threshold", "accepted patches, chosen at random"),
        TrainingSet("k-center", "crops that cover the embedding space"),
        TrainingSet("hdc", "crops with many edges, from every cluster of texture"),
        TrainingSet("loss-ranked", "crops that a small network finds hard, without the hardest"),
        TrainingSet("gsdd", "images inverted from an SR-GAN's generator (our reading of GSDD)", generated=True),
        TrainingSet("base", "images sampled from the base model without fine-tuning", generated=True),
        TrainingSet("distilled", "images sampled from the fine-tuned model and selected", generated=True),
        TrainingSet("full", "all photos, for as many iterations", whole=True),
        TrainingSet("full-thresholded", "all accepted patches, for as many iterations", whole=True),
    )
}
#: Kinds that contain all photos or patches.
WHOLE: tuple[TrainingSetName, ...] = tuple(name for name, kind in TRAINING_SETS.items() if kind.whole)
#: What tables call `distilled` where a teacher network has restored detail in it (``sample.detail_restoration`` above 0).
RESTORED_LABEL = "distilled + restored"
RESTORED_MEANING = (
    "the distilled images, their detail replaced by what a teacher SR network restores from their own LR images"
)


def label_of(source: str, restored: bool) -> str:
    """What tables call a training set.

    Args:
        restored: whether detail was restored in the distilled images.

    >>> label_of("distilled", True), label_of("distilled", False), label_of("random", True)
    ('distilled + restored', 'distilled', 'random')
    """
    return RESTORED_LABEL if source == "distilled" and restored else source
