"""The pipeline, stage by stage, for any way of building a stage: as Prefect tasks or directly. Same keys, same bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ddsr_core.baselines import crops as sources
from ddsr_core.baselines import gsdd
from ddsr_core.baselines import subset as subsets
from ddsr_core.baselines.config import CropsConfig, SubsetConfig
from ddsr_core.config import StageConfig
from ddsr_core.diffusion import class_rows, finetune, latents
from ddsr_core.diffusion.base import base_source, vae_source
from ddsr_core.errors import ConfigError
from ddsr_core.evaluation import evaluate as evaluation
from ddsr_core.imaging.images import photo_source
from ddsr_core.pipeline.config import PipelineConfig
from ddsr_core.pseudo_labels import clusters, embeddings, patches
from ddsr_core.sampling import sample as sampling
from ddsr_core.sr import train_sr
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.storage.store import Artifact, Stage, StageInput

#: Random crops that k-center, HDC and loss ranking choose from, for each image that they choose.
POOL_FACTOR = 20


class Build(Protocol):
    """Builds a stage, or finds it built: ``(artifact, was it there)``."""

    def __call__(
        self, stage: Stage, config: StageConfig, inputs: Mapping[str, StageInput], label: str = ""
    ) -> tuple[Artifact, bool]: ...


@dataclass(frozen=True)
class StageRun:
    """One stage of a run."""

    label: str
    artifact: Artifact
    cached: bool


@dataclass(frozen=True)
class TrainedNetwork:
    """One SR network of a run: what it was trained on, and its two artifacts."""

    arch: str
    source: str
    seed: int
    training: StageRun
    evaluation: StageRun


@dataclass(frozen=True)
class TrainingJob:
    """One SR network that a run will have, and its training images."""

    arch: str
    source: str
    seed: int
    recipe: TrainSRConfig
    images: StageInput
    label: str


#: Builds networks side by side before the chain asks for them one by one.
Ahead = Callable[[list[TrainingJob], StageInput], None]


@dataclass
class Chain:
    """What a run has built so far, in order."""

    build: Build
    log: Callable[[str], None]
    stages: list[StageRun] = field(default_factory=list)
    networks: list[TrainedNetwork] = field(default_factory=list)
    bicubic: StageRun | None = None

    def add(self, stage: Stage, config: StageConfig, label: str = "", **inputs: StageInput) -> Artifact:
        """Build a stage and note it."""
        self.log(f"{stage.name} {label}: begins, key {stage.key(config, inputs)}")
        artifact, cached = self.build(stage, config, inputs, label)
        self.log(f"{stage.name} {label}: {'from cache' if cached else 'built'}, {artifact.manifest.bytes} bytes")
        self.stages.append(StageRun(label or stage.name, artifact, cached))
        return artifact

    def named(self, stage: str) -> Artifact | None:
        """The first artifact of a stage, None if the run has not built one."""
        return next((item.artifact for item in self.stages if item.artifact.manifest.stage == stage), None)


def distill_and_train(
    config: PipelineConfig,
    photos: Path,
    test: Path | None,
    build: Build,
    log: Callable[[str], None],
    ahead: Ahead | None = None,
) -> Chain:
    """The whole method: a folder of photos in, a distilled set and measured SR networks out.

    Args:
        photos: training photos.
        test: test photos; None if no SR network is to be trained.
        build: how a stage is built.
        log: takes a line when a stage begins and when it is there.
        ahead: trains the networks side by side; none: one by one.
    """
    chain = Chain(build, log)
    distilled, accepted = distill(chain, config, photos)
    if config.sr.archs:
        if test is None:
            raise ConfigError("SR networks need test photos", where="--test", fix="name a folder with --test")
        train_networks(chain, config, photos, test, distilled, accepted, ahead)
    return chain


def distill(
    chain: Chain, config: PipelineConfig, photos: Path, earlier: Mapping[str, StageInput] | None = None
) -> tuple[Artifact, Artifact]:
    """Photos -> patches -> embeddings -> clusters -> adapter -> distilled set. Returns the set and the patches.

    Args:
        earlier: ``start`` and ``start_clusters``, an adapter that fine-tuning goes on from; none: from the base.
    """
    model, decoder = base_model(config), lsr_decoder(config)  # weights first: if they are missing, nothing has been done yet
    accepted = chain.add(patches.STAGE, config.patches, photos=photo_source(photos))
    described = {"patches": accepted, **clip_weights(config.embeddings)}
    vectors = chain.add(embeddings.STAGE, config.embeddings, "", **described)
    labels = chain.add(clusters.STAGE, config.clusters, embeddings=vectors)
    encoded = chain.add(latents.STAGE, config.latents, "", patches=accepted, **model)
    rows = first_rows(chain, config, labels, model["base"])
    learned = {"latents": encoded, "clusters": labels, **model, **rows, **decoder, **(earlier or {})}
    adapter = chain.add(finetune.STAGE, config.finetune, "", **learned)
    start = {"latents": encoded} if config.sample.strength < 1 else {}
    teacher = {"teacher": teacher_of(chain, config, accepted)} if config.sample.needs_teacher else {}
    drawn = {"adapter": adapter, "clusters": labels, "embeddings": vectors, **described, **model, **start, **teacher}
    return chain.add(sampling.STAGE, config.sample, "", **drawn), accepted


def teacher_of(chain: Chain, config: PipelineConfig, accepted: Artifact) -> Artifact:
    """The SR network that candidates are compared by and detail is restored by, trained on the accepted patches."""
    return chain.add(train_sr.STAGE, config.teacher, "teacher", data=accepted, **train_sr.trunk_input(config.teacher))


def base_model(config: PipelineConfig) -> dict[str, StageInput]:
    """The base, and its VAE where the config names another."""
    base = base_source(config.base)
    return {"base": base, "vae": vae_source(config.vae)} if config.vae else {"base": base}


def lsr_decoder(config: PipelineConfig) -> dict[str, StageInput]:
    """What L_SR decodes with, where the config names it and fine-tuning needs it."""
    if config.lsr_decoder is None or config.finetune.lsr_mode == "off":
        return {}
    return {"decoder": vae_source(config.lsr_decoder, "lsr_decoder")}


def first_rows(chain: Chain, config: PipelineConfig, labels: Artifact, base: StageInput) -> dict[str, StageInput]:
    """The classes nearest the clusters, where fine-tuning starts from them."""
    if config.finetune.class_row_init != "clip_nearest":
        return {}
    settings = config.class_rows.model_copy(update={"embeddings": config.embeddings})
    inputs = {"clusters": labels, "base": base, **clip_weights(config.embeddings)}
    return {"rows": chain.add(class_rows.STAGE, settings, "", **inputs)}


def clip_weights(config: embeddings.EmbeddingsConfig) -> dict[str, StageInput]:
    """The open_clip weights file as an input, where the config names one: its content belongs into the key."""
    file = embeddings.weights_source(config)
    return {"weights": file} if file else {}


def train_networks(
    chain: Chain,
    config: PipelineConfig,
    photos: Path,
    test: Path,
    distilled: Artifact,
    accepted: Artifact,
    ahead: Ahead | None = None,
) -> None:
    """Every network on every data source, at equal iterations, and bicubic beside them."""
    tests = photo_source(test)
    chain.add(evaluation.STAGE, config.evaluate, "bicubic", test=tests)
    chain.bicubic = chain.stages[-1]
    data = {name: data_source(chain, name, config, photos, distilled, accepted) for name in config.sr.training_sets}
    cells = [
        TrainingJob(arch, name, seed, config.sr.recipe(arch, seed), images, arch_label(config, arch, name, seed))
        for arch in config.sr.archs
        for name, images in data.items()
        for seed in config.sr.seeds
    ]
    if ahead is not None:
        ahead(cells, tests)
    for cell in cells:
        weights = chain.add(train_sr.STAGE, cell.recipe, cell.label, data=cell.images, **train_sr.trunk_input(cell.recipe))
        training = chain.stages[-1]
        chain.add(evaluation.STAGE, config.evaluate, cell.label, weights=weights, test=tests)
        chain.networks.append(TrainedNetwork(cell.arch, cell.source, cell.seed, training, chain.stages[-1]))


def arch_label(config: PipelineConfig, arch: str, source: str, seed: int) -> str:
    """What a network's stages are called in a run."""
    return f"{arch} {source}" + (f" seed {seed}" if len(config.sr.seeds) > 1 else "")


def data_source(
    chain: Chain, name: str, config: PipelineConfig, photos: Path, distilled: Artifact, accepted: Artifact
) -> StageInput:
    """The training images of one source: as many crops as there are distilled images, or all photos."""
    if name == "distilled":
        return distilled
    if name == "full":
        return photo_source(photos)
    if name == "full-thresholded":
        return accepted
    if name == "base":
        untuned = config.finetune.model_copy(update={"steps": 0, "epochs": None})
        as_drawn = config.sample.model_copy(update={"detail_restoration": 0.0})
        return distill(chain, config.model_copy(update={"finetune": untuned, "sample": as_drawn}), photos)[0]
    if name == "gsdd":
        return gsdd_set(chain, config, accepted)
    if name in ("k-center", "hdc", "loss-ranked"):
        return subset(chain, name, config, photos)
    crops = CropsConfig(
        kind="random" if name == "random" else "threshold",
        count=config.sample.count,
        patch_px=config.patches.patch_px,
        kernel=config.patches.kernel,
        seed=config.sr.seeds[0],
    )
    if name == "random":
        return chain.add(sources.STAGE, crops, "random crops", photos=photo_source(photos))
    return chain.add(sources.STAGE, crops, "threshold crops", patches=accepted)


def gsdd_set(chain: Chain, config: PipelineConfig, accepted: Artifact) -> Artifact:
    """GSDD with the run's pseudo-labels for classes, and a generator trained on its accepted patches."""
    labels = chain.named(clusters.STAGE.name)
    assert labels is not None  # distilled sets come first
    recipe = config.gsdd_generator
    generator = chain.add(train_sr.STAGE, recipe, "generator of gsdd", data=accepted, **train_sr.trunk_input(recipe))
    settings = config.gsdd.model_copy(update={"count": config.sample.count, "seed": config.sr.seeds[0]})
    return chain.add(gsdd.STAGE, settings, "gsdd", patches=accepted, clusters=labels, generator=generator)


def subset(chain: Chain, kind: str, config: PipelineConfig, photos: Path) -> Artifact:
    """A choice among `POOL_FACTOR` times as many random crops."""
    size = config.sample.count * POOL_FACTOR
    crops = CropsConfig(count=size, patch_px=config.patches.patch_px, kernel=config.patches.kernel, seed=config.sr.seeds[0])
    pool = chain.add(sources.STAGE, crops, "pool of crops", photos=photo_source(photos))
    chosen = SubsetConfig.model_validate(
        {"kind": kind, "count": config.sample.count, "seed": config.sr.seeds[0], "embeddings": config.embeddings}
    )
    return chain.add(subsets.STAGE, chosen, f"{kind} crops", **{"pool": pool, **clip_weights(config.embeddings)})
