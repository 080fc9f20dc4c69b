"""How each training set is made: the functions that `ddsr_core.baselines.names.TRAINING_SETS` names.

Each takes the stages of the run and its distilled set, and returns as many images as are distilled, or all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from ddsr_core.errors import ConfigError
from ddsr_core.pipeline.distill import without_finetuning
from ddsr_core.pipeline.stages import Distilled, Stages
from ddsr_core.storage.stage import Artifact, Source


def distilled(stages: Stages, made: Distilled) -> Artifact:
    """The distilled images themselves."""
    return made.images


def full(stages: Stages, made: Distilled) -> Source:
    """All photos."""
    return made.photos


def full_thresholded(stages: Stages, made: Distilled) -> Artifact:
    """All accepted patches."""
    return made.labels.patches


def random(stages: Stages, made: Distilled) -> Artifact:
    """Random crops of the photos."""
    return stages.crops(made.photos)


def threshold(stages: Stages, made: Distilled) -> Artifact:
    """Accepted patches, chosen at random."""
    return stages.accepted_crops(made.labels.patches)


def random_restored(stages: Stages, made: Distilled) -> Artifact:
    """Random crops with restored detail."""
    return stages.restore(random(stages, made), made.labels.patches, "random crops, restored")


def threshold_restored(stages: Stages, made: Distilled) -> Artifact:
    """Accepted patches, chosen at random, with restored detail."""
    return stages.restore(threshold(stages, made), made.labels.patches, "threshold crops, restored")


def k_center(stages: Stages, made: Distilled) -> Artifact:
    """Crops that cover the embedding space."""
    return stages.subset("k-center", made.photos)


def hdc(stages: Stages, made: Distilled) -> Artifact:
    """Crops with many edges, from every cluster of texture."""
    return stages.subset("hdc", made.photos)


def loss_ranked(stages: Stages, made: Distilled) -> Artifact:
    """Crops that a small network finds hard, without the hardest."""
    return stages.subset("loss-ranked", made.photos)


def gsdd(stages: Stages, made: Distilled) -> Artifact:
    """Images inverted from the generator of an SR-GAN."""
    return stages.gsdd(made.labels)


def base(stages: Stages, made: Distilled) -> Artifact:
    """Images sampled from the base model without fine-tuning."""
    return without_finetuning(stages, made.photos).images


def photos_alone(stages: Stages, photos: Source) -> Distilled:
    """Photos of which nothing has been distilled: a training set that is cut out of them is made from this, too."""
    return cast(Distilled, _PhotosAlone(stages, photos))


@dataclass(frozen=True)
class _PhotosAlone:
    """Has the attributes of `Distilled` and of its `PseudoLabels`, and builds each when it is asked for."""

    stages: Stages
    photos: Source

    @property
    def labels(self) -> _PhotosAlone:
        return self

    @property
    def patches(self) -> Artifact:
        return self.stages.patches(self.photos)

    @property
    def embeddings(self) -> Artifact:
        return self.stages.embeddings(self.patches)

    @property
    def clusters(self) -> Artifact:
        return self.stages.clusters(self.embeddings)

    @property
    def images(self) -> Artifact:
        raise ConfigError(
            "this training set is made from a distilled set, and there is none",
            where="training_set",
            fix="run ddsr distill with sr.training_sets",
        )
