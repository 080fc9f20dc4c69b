"""The method from end to end: photos -> distilled set -> SR networks trained on it and on what it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ddsr_core.baselines.names import TRAINING_SETS, TrainingSetName
from ddsr_core.errors import ConfigError
from ddsr_core.factories import load_factory
from ddsr_core.pipeline.networks import NetworkJob, network_job, network_of, prefetched
from ddsr_core.pipeline.stages import Distilled, PseudoLabels, StageRun, Stages
from ddsr_core.storage.stage import Artifact, Source, StageInput


@dataclass(frozen=True)
class TrainedNetwork:
    """One SR network of a run: what it was trained on, and its two artifacts."""

    arch: str
    source: str
    seed: int
    training: StageRun
    evaluation: StageRun


@dataclass(frozen=True)
class Comparison:
    """What a run has measured: its SR networks, and bicubic upscaling beside them."""

    bicubic: StageRun
    networks: tuple[TrainedNetwork, ...]


def distill(stages: Stages, photos: Source, earlier: Mapping[str, StageInput] | None = None) -> Distilled:
    """Distill photos: sections II-A to II-C of the paper.

    Args:
        earlier: ``from_adapter`` and ``from_clusters``: an adapter to continue from, and its clusters. None: from the base.
    """
    accepted = stages.patches(photos)
    embedded = stages.embeddings(accepted)
    clusters = stages.clusters(embedded)

    encoded = stages.latents(accepted)
    rows = stages.class_rows(accepted, clusters)
    adapter = stages.finetune(encoded, clusters, rows, earlier)

    labels = PseudoLabels(accepted, embedded, clusters)
    teacher = stages.teacher(accepted)
    return Distilled(photos, labels, stages.sample(adapter, labels, encoded, teacher))


def compare(stages: Stages, distilled: Distilled, tests: Source) -> Comparison:
    """Section III: every network on every training set, for the same number of iterations, and bicubic beside them."""
    stages.evaluate(tests)
    bicubic = stages.runs[-1]
    sets = {name: training_set(stages, name, distilled) for name in stages.config.training_sets}
    networks = []
    for job, (name, images) in prefetched(stages, _jobs(stages, sets, tests)):
        network_of(stages, job, images, tests)
        training, evaluation = stages.runs[-2:]
        networks.append(TrainedNetwork(job.recipe.arch, name, job.recipe.seed, training, evaluation))
    return Comparison(bicubic, tuple(networks))


def _jobs(
    stages: Stages, sets: Mapping[TrainingSetName, StageInput], tests: Source
) -> Iterator[tuple[NetworkJob, tuple[str, StageInput]]]:
    recipes = stages.config.sr
    for arch in recipes.archs:
        for name, images in sets.items():
            for seed in recipes.seeds:
                label = f"{arch} {name}" + (f" seed {seed}" if len(recipes.seeds) > 1 else "")
                yield network_job(stages, recipes.recipe(arch, seed), images, tests, label), (name, images)


def training_set(stages: Stages, name: TrainingSetName, distilled: Distilled) -> Artifact | Source:
    """The images of one training set: as many as there are distilled images, or all of them.

    Raises:
        ConfigError: the name is none of `ddsr_core.baselines.names.TRAINING_SETS`.
    """
    if name not in TRAINING_SETS:
        known = ", ".join(TRAINING_SETS)
        raise ConfigError(f"unknown training set {name!r}", where="sr.training_sets", fix=f"use one of {known}")
    made: Artifact | Source = load_factory(TRAINING_SETS[name].build, "TRAINING_SETS")(stages, distilled)
    return made


def without_finetuning(stages: Stages, photos: Source) -> Distilled:
    """The set that the base model itself samples, with no detail restored."""
    config = stages.config
    untuned = config.finetune.model_copy(update={"steps": 0, "epochs": None})
    as_sampled = config.sample.model_copy(update={"detail_restoration": 0.0})
    return distill(stages.with_config(config.model_copy(update={"finetune": untuned, "sample": as_sampled})), photos)
