"""Training or measuring a single network as a named run: listed by `ddsr runs` and kept by `ddsr gc`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import BaseModel, Field

from ddsr_core.baselines.generated import require_generated
from ddsr_core.baselines.names import TRAINING_SETS, TrainingSetName
from ddsr_core.errors import ConfigError
from ddsr_core.evaluation import evaluate
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.imaging.hold_out import keep_apart
from ddsr_core.imaging.kernel import Scale
from ddsr_core.imaging.photos import photo_source
from ddsr_core.pipeline.pins import Pins
from ddsr_core.pipeline.preflight import left_out_notices
from ddsr_core.pipeline.request import AtLeastOne, Execution, name_of, slug
from ddsr_core.pipeline.run import give_notice, require_one_machine
from ddsr_core.pipeline.run_folder import free_name
from ddsr_core.pipeline.run_state import begin_step, complete_run, failure_noted, run_log
from ddsr_core.pipeline.stages import Backend, Stages
from ddsr_core.pipeline.steps import Crops, config_of, fitted, images_of, weights_source, with_overrides
from ddsr_core.pseudo_labels.names import EmbedderName
from ddsr_core.sr import train_sr
from ddsr_core.sr.architectures import ARCHITECTURES
from ddsr_core.sr.config import VALIDATIONS, Degradation, TrainSRConfig, ValidationConfig
from ddsr_core.storage.stage import Artifact, Source
from ddsr_core.storage.store import Store

#: A network by name, shown as a choice in forms; Python may pass ``module:Class``.
Network = Annotated[str, Field(json_schema_extra={"enum": list(ARCHITECTURES)})]


class TrainRequest(Execution):
    """One SR network to train."""

    data: Path = Field(description="Folder of HR images, image set such as runs/demo/distilled, or Parquet.")
    arch: Network = Field("edsr-small", description="Network.")
    training_set: TrainingSetName = Field(
        "full", description="Which part of the data to train on. full: all of it, unchanged."
    )
    count: AtLeastOne = Field(70, description="Number of crops, for training sets that consist of crops of the data.")
    patch_px: int = Field(64, ge=16, description="Height and width of these crops in pixels.")
    embeddings: EmbedderName = Field("vgg16", description="Features that k-center and hdc compare crops by.")
    iterations: AtLeastOne = Field(2000, description="Optimizer steps. The paper's networks take 100,000 and more.")
    scale: Scale = Field(4, description="Upsampling factor.")
    degradation: Degradation = Field(
        "bicubic", description="How LR images are made. real-esrgan: random blur, noise and JPEG, for unknown photos."
    )
    init: Path | None = Field(None, description="Weights to start from: a train_sr folder, or a file of the same network.")
    test: Path | None = Field(
        None, description="Photos to validate on during training. The best weights are stored in addition to the last ones."
    )
    validation: ValidationConfig | None = Field(
        None, description="How to validate on the test photos. Without it, ten validations."
    )
    overrides: tuple[str, ...] = Field((), description="Fields of the recipe to change, such as batch_size=8.")
    run: str | None = Field(None, description="Name of the run below home/runs. Without it, network and data.")

    def recipe(self) -> TrainSRConfig:
        """The training's configuration.

        Raises:
            ConfigError: unknown network or field, a value out of range, or a validation without test photos.
        """
        validation = self.validation
        if self.test is None and validation is not None:
            raise ConfigError("a validation needs test photos", where="test", fix="name them with --test")
        if self.test is not None and validation is None:
            validation = ValidationConfig(every=max(1, self.iterations // VALIDATIONS))
        values = {
            "arch": self.arch, "iterations": self.iterations, "scale": self.scale, "degradation": self.degradation,
            "validation": validation.model_dump() if validation else None,
        }  # fmt: skip
        return with_overrides(TrainSRConfig, values, self.overrides)

    @property
    def run_name(self) -> str:
        """Name of the run: the user's, or else network and data, such as ``edsr-small-demo-distilled``."""
        return self.run or f"{slug(self.arch)}-{set_name(self.data)}"


class EvaluateRequest(Execution):
    """Networks to measure on a test set."""

    test: Path = Field(description="Folder of HR images, or a folder that contains HR/ and LRx4/.")
    weights: tuple[str, ...] = Field((), description="Weights files or train_sr folders. Bicubic is always measured.")
    protocol: EvaluateConfig = EvaluateConfig()
    run: str | None = Field(None, description="Name of the run below home/runs. Without it, evaluate and the test set.")

    @property
    def run_name(self) -> str:
        """Name of the run: the user's, or else ``evaluate-`` and the test set."""
        return self.run or f"evaluate-{set_name(self.test)}"


@dataclass(frozen=True)
class Trained:
    """A network that a run has trained.

    Attributes:
        run: name of the run.
        weights: its artifact, a folder with ``weights.safetensors`` and ``weights.pth``.
        cached: whether it already existed.
        left_out: number of images that were left out because they are also test photos.
    """

    run: str
    weights: Artifact
    cached: bool
    left_out: int = 0


@dataclass(frozen=True)
class TrainingInputs:
    """What a network is trained on.

    Attributes:
        data: the images.
        more: the inputs ``test`` of a validation and ``init``, if they are given.
        left_out: names of images that are not among ``data`` because they are also test photos.
    """

    data: Source
    more: dict[str, Source]
    left_out: tuple[str, ...] = ()


def inputs_of(request: TrainRequest, store: Store) -> TrainingInputs:
    """Hash the inputs of a training. Images that are also test photos are left out.

    Raises:
        ConfigError: all images are test photos, or some are and other machines take part.
        InputError: no such images or weights, or ``data`` is not a generated set of the kind that is asked for.
    """
    if request.training_set in TRAINING_SETS and TRAINING_SETS[request.training_set].generated:
        require_generated(request.training_set, request.data.expanduser())
    init = {"init": weights_source(request.init.expanduser())} if request.init else {}
    if request.test is None:
        return TrainingInputs(photo_source(request.data), init)
    apart = keep_apart(request.data, request.test, store.home)
    if apart.left_out:
        require_one_machine(request, store, len(apart.left_out))
    return TrainingInputs(apart.train, {"test": apart.test, **init}, apart.left_out)


def run_training(request: TrainRequest, store: Store, backend: Backend, *, wait: bool = False) -> Trained:
    """Train one network on all of ``data``, or on crops of it. Test photos are left out of training.

    Raises:
        ConfigError: unknown network or field, a name that is taken by another network, or all images are test photos.
        InputError: no images, or ``data`` is not a generated set of that kind.
        StorageError: the home cannot be written, or another command is working on the run.
    """
    recipe = request.recipe()
    inputs = inputs_of(request, store)
    data, more = inputs.data, inputs.more
    crops = Crops(request.training_set, request.count, request.patch_px, request.embeddings)
    identity = {
        "kind": "train-sr", "photos_digest": data.digest, "recipe": with_crops(recipe, crops),
        **{f"{name}_digest": source.digest for name, source in more.items()},
    }  # fmt: skip
    about = f"{recipe.arch}, {recipe.iterations:,} iterations, on {request.data}"
    with open_step(store, request, identity, recipe, about, left_out=len(inputs.left_out), wait=wait) as step:
        stages = Stages(config_of(crops, recipe.scale), step.pins.over(backend), run_log(store, step.name))
        give_notice(stages, left_out_notices(inputs.left_out))
        images = images_of(stages, data, request.training_set)
        weights = stages.train_sr(fitted(recipe, images.path), images, recipe.arch, more)
        complete_run(store, step.name, stages.runs)
        return Trained(step.name, weights, stages.runs[-1].cached, len(inputs.left_out))


def run_evaluation(
    request: EvaluateRequest, store: Store, backend: Backend, *, wait: bool = False
) -> Mapping[str, Artifact]:
    """Measure networks by the names given, and bicubic upscaling, which comes first.

    Raises:
        InputError: no weights, or no test images.
        StorageError: the home cannot be written, or another command is working on the run.
    """
    tests = photo_source(request.test)
    named = {name: weights_source(Path(name).expanduser()) for name in request.weights if name != evaluate.BICUBIC}
    digests = sorted(source.digest for source in named.values())
    protocol = request.protocol.model_dump_json()
    identity = {"kind": "evaluate", "tests_digest": tests.digest, "networks": ",".join(digests), "recipe": protocol}
    about = f"{', '.join(named) or evaluate.BICUBIC} on {request.test}"
    with open_step(store, request, identity, request.protocol, about, wait=wait) as step:
        stages = Stages(config_of(Crops()), step.pins.over(backend), run_log(store, step.name))
        stages = replace(stages, config=stages.config.model_copy(update={"evaluate": request.protocol}))
        networks = {name: stages.evaluate(tests, source, name) for name, source in named.items()}  # first: may be damaged
        measured = {evaluate.BICUBIC: stages.evaluate(tests), **networks}
        complete_run(store, step.name, stages.runs)
        return measured


class NamedRequest(Protocol):
    """A request that belongs to a named run.

    Attributes:
        run: the name that the user has chosen, if any.
        run_name: that name, or the default.
    """

    @property
    def run(self) -> str | None: ...
    @property
    def run_name(self) -> str: ...


@dataclass(frozen=True)
class Step:
    """A run of a single step, begun and not yet finished."""

    name: str
    pins: Pins


@contextmanager
def open_step(
    store: Store,
    request: NamedRequest,
    identity: Mapping[str, str | None],
    config: BaseModel,
    about: str,
    *,
    left_out: int = 0,
    wait: bool,
) -> Iterator[Step]:
    """Begin the run of a single step, without a report. If it stops early, run.json says why.

    Args:
        left_out: number of training images that are left out because they are also test photos.
    """
    store.check()
    name = free_name(store, request.run_name, identity, chosen=request.run is not None)
    with store.locked(f"locks/run-{name}", name, f"the run {name!r}, begun", wait=wait), failure_noted(store, name):
        begin_step(store, name, config, {**identity, "about": about, "left_out": left_out})
        pins = Pins(store, name)
        yield Step(name, pins)
        pins.drop()


def with_crops(recipe: TrainSRConfig, crops: Crops) -> str:
    """The part of a run's description that distinguishes two trainings on the same data."""
    return train_sr.STAGE.key(recipe, {}) + ("" if crops.source == "full" else f" {crops}")


def set_name(folder: Path) -> str:
    """How the names of runs abbreviate a data set, such as ``demo-distilled`` for ``runs/demo/distilled``."""
    path = folder.expanduser().resolve()
    return f"{slug(path.parent.name)}-distilled" if path.name == "distilled" else name_of(folder)
