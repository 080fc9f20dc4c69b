"""What each training set is made of, and a new one in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import pytest
from pydantic import ValidationError

from ddsr_core.baselines.names import TRAINING_SETS, TrainingSet
from ddsr_core.errors import ConfigError
from ddsr_core.factories import load_factory
from ddsr_core.pipeline.config import SRConfig, load_config
from ddsr_core.pipeline.distill import distill, training_set
from ddsr_core.pipeline.stages import Distilled, Stages
from ddsr_core.pipeline.training_sets import photos_alone
from ddsr_core.storage.stage import Artifact, Source
from tests.unit.test_stages import fake_stages

PHOTOS = Source(Path("photos"), "digest")


def shuffled(stages: Stages, distilled: Distilled) -> Artifact:
    """The file of a new training set: twice as many random crops."""
    sample = stages.config.sample.model_copy(update={"count": 2 * stages.config.sample.count})
    return stages.with_config(stages.config.model_copy(update={"sample": sample})).crops(distilled.photos)


@pytest.fixture
def made() -> tuple[Stages, Distilled]:
    stages = fake_stages(load_config("demo"))
    return stages, distill(stages, PHOTOS)


def test_a_new_training_set_is_a_function_and_one_line(made: tuple[Stages, Distilled], monkeypatch: pytest.MonkeyPatch):
    line = TrainingSet("double", "twice as many random crops", f"{__name__}:shuffled")
    monkeypatch.setitem(TRAINING_SETS, "double", line)
    assert SRConfig(training_sets=("double",)).training_sets == ("double",)
    stages, distilled = made
    images = training_set(stages, "double", distilled)
    assert images.digest not in {training_set(stages, name, distilled).digest for name in TRAINING_SETS if name != "double"}
    assert training_set(stages, "double", photos_alone(stages, PHOTOS)).digest == images.digest


def test_every_training_set_is_another_one(made: tuple[Stages, Distilled]):
    stages, distilled = made
    sets = {name: training_set(stages, name, distilled).digest for name in TRAINING_SETS}
    assert len(set(sets.values())) == len(TRAINING_SETS)
    assert sets["full"] == PHOTOS.digest
    assert sets["distilled"] == distilled.images.digest
    assert sets["full-thresholded"] == distilled.labels.patches.digest


@pytest.mark.parametrize("name", [name for name, kind in TRAINING_SETS.items() if not kind.generated])
def test_photos_alone_give_the_same_set_as_a_distilled_run(made: tuple[Stages, Distilled], name: str):
    stages, distilled = made
    assert training_set(stages, name, photos_alone(stages, PHOTOS)).digest == training_set(stages, name, distilled).digest


def test_a_set_of_crops_clusters_nothing():
    stages = fake_stages(load_config("demo"))
    training_set(stages, "threshold", photos_alone(stages, PHOTOS))
    assert [run.label for run in stages.runs] == ["patches", "threshold crops"]


def test_photos_alone_have_no_distilled_images():
    stages = fake_stages(load_config("demo"))
    with pytest.raises(ConfigError, match="there is none"):
        training_set(stages, "distilled", photos_alone(stages, PHOTOS))


def test_an_unknown_training_set_is_refused_with_the_known_ones(made: tuple[Stages, Distilled]):
    with pytest.raises(ConfigError, match="unknown training set 'k-means'") as caught:
        training_set(made[0], "k-means", made[1])
    assert "loss-ranked" in str(caught.value)
    with pytest.raises(ValidationError, match="use one of random"):
        SRConfig(training_sets=("k-means",))


def test_the_builders_take_stages_and_a_distilled_set():
    for kind in TRAINING_SETS.values():
        hints: dict[str, Any] = get_type_hints(load_factory(kind.build, "TRAINING_SETS"))
        assert [hints[name] for name in hints if name != "return"] == [Stages, Distilled]
