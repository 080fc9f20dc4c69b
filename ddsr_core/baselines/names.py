"""The kinds of training sets of SR networks: the only place that defines them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema


@dataclass(frozen=True)
class TrainingSet:
    """One kind of training set.

    Attributes:
        name: name in configs, options, tables and ``report.json``.
        meaning: description in the legend of a table.
        build: ``module:function``. The function takes the stages of a run, `ddsr_core.pipeline.stages.Stages`, and its
            `ddsr_core.pipeline.stages.Distilled`, and returns the images, an artifact or a folder of photos.
        whole: whether it contains all photos or patches, so that it has no number of images to be compared at.
        generated: whether a run of the pipeline generates it with a model. ``ddsr train-sr`` cannot cut such a set out of
            a folder of photos.
        restored_from: for crops in which a teacher network has restored detail, the kind of crops.
    """

    name: str
    meaning: str
    build: str
    whole: bool = False
    generated: bool = False
    restored_from: str = ""

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{self.restored_from} + restored" if self.restored_from else self.name


_OURS = "ddsr_core.pipeline.training_sets"
#: Kinds of training sets in the order of tables: baselines, ours, everything. A new one is a file in `ddsr_core.pipeline`
#: and one line here.
TRAINING_SETS: Mapping[str, TrainingSet] = {
    kind.name: kind
    for kind in (
        TrainingSet("random", "random crops of the photos", f"{_OURS}:random"),
        TrainingSet("threshold", "accepted patches, chosen at random", f"{_OURS}:threshold"),
        TrainingSet(
            "random-restored",
            "the random crops, their detail replaced by the teacher of the distilled set",
            f"{_OURS}:random_restored",
            restored_from="random",
        ),
        TrainingSet(
            "threshold-restored",
            "the accepted patches of `threshold`, their detail replaced by the teacher of the distilled set",
            f"{_OURS}:threshold_restored",
            restored_from="threshold",
        ),
        TrainingSet("k-center", "crops that cover the embedding space", f"{_OURS}:k_center"),
        TrainingSet("hdc", "crops with many edges, from every cluster of texture", f"{_OURS}:hdc"),
        TrainingSet("loss-ranked", "crops that a small network finds hard, without the hardest", f"{_OURS}:loss_ranked"),
        TrainingSet(
            "gsdd", "images inverted from an SR-GAN's generator (our reading of GSDD)", f"{_OURS}:gsdd", generated=True
        ),
        TrainingSet("base", "images sampled from the base model without fine-tuning", f"{_OURS}:base", generated=True),
        TrainingSet(
            "distilled", "images sampled from the fine-tuned model and selected", f"{_OURS}:distilled", generated=True
        ),
        TrainingSet("full", "all photos, for as many iterations", f"{_OURS}:full", whole=True),
        TrainingSet(
            "full-thresholded", "all accepted patches, for as many iterations", f"{_OURS}:full_thresholded", whole=True
        ),
    )
}


def known_training_set(name: str) -> str:
    """The name itself.

    Raises:
        ValueError: not a name in `TRAINING_SETS`.
    """
    if name not in TRAINING_SETS:
        raise ValueError(f"unknown training set {name!r}; use one of {', '.join(TRAINING_SETS)}")
    return name


#: A name in `TRAINING_SETS`, as a type of config fields.
TrainingSetName = Annotated[
    str,
    AfterValidator(known_training_set),
    WithJsonSchema({"type": "string", "enum": list(TRAINING_SETS), "title": "Training set"}),
]
#: Kinds that contain all photos or patches.
WHOLE: tuple[TrainingSetName, ...] = tuple(name for name, kind in TRAINING_SETS.items() if kind.whole)
#: Real crops with restored detail. Where a restored distilled set is compared with other sets, these are among them.
RESTORED_CROPS: tuple[TrainingSetName, ...] = tuple(name for name, kind in TRAINING_SETS.items() if kind.restored_from)
#: What tables call `distilled` where a teacher network has restored detail in it (``sample.detail_restoration`` above 0).
RESTORED_LABEL = "distilled + restored"
RESTORED_MEANING = (
    "the distilled images, their detail replaced by what a teacher SR network restores from their own LR images"
)


def label_of(source: str, restored: bool) -> str:
    """What tables call a training set.

    Args:
        restored: whether detail was restored in the distilled images.

    >>> label_of("distilled", True), label_of("distilled", False)
    ('distilled + restored', 'distilled')
    >>> label_of("random", True), label_of("random-restored", True)
    ('random', 'random + restored')
    """
    if source == "distilled" and restored:
        return RESTORED_LABEL
    return TRAINING_SETS[source].label if source in TRAINING_SETS else source
