"""The stages of the paper as methods, for one run. They are built as Prefect tasks or directly: same keys, same bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from ddsr_core.baselines import crops, gsdd, restore, subset
from ddsr_core.baselines.config import CropsConfig, RestoreConfig, SubsetConfig
from ddsr_core.config import StageConfig
from ddsr_core.diffusion import class_rows, finetune, latents
from ddsr_core.errors import ConfigError
from ddsr_core.evaluation import evaluate
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.parallel import RunParts
from ddsr_core.pipeline.config import PipelineConfig
from ddsr_core.pipeline.model_files import ModelFiles
from ddsr_core.pseudo_labels import clusters, embeddings, patches
from ddsr_core.report.cost import TEACHER
from ddsr_core.reporters import Tracking
from ddsr_core.sampling import sample
from ddsr_core.sr import train_sr
from ddsr_core.sr.architectures import ARCHITECTURES
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.storage.files import now
from ddsr_core.storage.stage import Artifact, Source, Stage, StageInput

#: Random crops that k-center, HDC and loss ranking choose from, for each image that they choose.
POOL_FACTOR = 20


class Build(Protocol):
    """Builds a stage, or finds its artifact: ``(artifact, whether it already existed)``."""

    def __call__(
        self, stage: Stage, config: StageConfig, inputs: Mapping[str, StageInput], label: str = ""
    ) -> tuple[Artifact, bool]: ...


@dataclass(frozen=True)
class Backend:
    """How the stages of a run are built: directly (`ddsr_core.pipeline.plain`) or as Prefect tasks (`tasks.backend`).

    Attributes:
        build: builds one stage.
        home: address with which another process opens the store of the run.
        device: torch device, or auto.
        networks: trains many SR networks at once (`ddsr_core.pipeline.networks`); None: one after another.
        only_small: use ``networks`` only if every network has a small step (`ddsr_core.pipeline.networks.has_small_step`).
        tracking: where the curves of a stage are shown, by its name in the run and the key of its artifact.
    """

    build: Build
    home: str
    device: str = "auto"
    networks: RunParts | None = None
    only_small: bool = False
    tracking: Callable[[str, str], Tracking | None] = lambda name, key: None


@dataclass(frozen=True)
class StageRun:
    """One stage of a run: what the run calls it, its artifact, and whether it already existed."""

    label: str
    artifact: Artifact
    cached: bool


@dataclass(frozen=True)
class PseudoLabels:
    """The accepted patches of a photo source, their embeddings and their clusters (section II-A)."""

    patches: Artifact
    embeddings: Artifact
    clusters: Artifact


@dataclass(frozen=True)
class Distilled:
    """A distilled set, and what it was distilled from."""

    photos: Source
    labels: PseudoLabels
    images: Artifact


@dataclass(frozen=True)
class Stages:
    """The stages with the config of one run. Each method builds or finds one artifact and appends it to ``runs``.

    Attributes:
        log: receives a line when a stage begins and when it ends.
        runs: what has been built so far, in order; shared with the copies of `with_config`.
        begun: UTC, ISO 8601; artifacts that are newer count as built by this run, such as networks of its workers.
    """

    config: PipelineConfig
    backend: Backend
    log: Callable[[str], None] = lambda line: None
    files: ModelFiles = field(default_factory=ModelFiles)
    runs: list[StageRun] = field(default_factory=list)
    begun: str = field(default_factory=lambda: now("microseconds"))

    def with_config(self, config: PipelineConfig) -> Stages:
        """The same run with another config, such as another seed."""
        return replace(self, config=config)

    # II-A: pseudo labels

    def patches(self, photos: Source) -> Artifact:
        """The patches of the photos that bicubic upscaling restores badly.

        Raises:
            ConfigError: there are fewer than clusters.
        """
        accepted = self.build(patches.STAGE, self.config.patches, {"photos": photos})
        require_patches(self.config, accepted.manifest.counts.get("accepted"))
        return accepted

    def embeddings(self, accepted: Artifact) -> Artifact:
        """A feature vector for each accepted patch."""
        return self.build(embeddings.STAGE, self.config.embeddings, {"patches": accepted, **self._clip()})

    def clusters(self, embedded: Artifact) -> Artifact:
        """The pseudo label of each patch: its k-means cluster."""
        return self.build(clusters.STAGE, self.config.clusters, {"embeddings": embedded})

    # II-B: fine-tuning the diffusion transformer

    def latents(self, accepted: Artifact) -> Artifact:
        """The patches, encoded by the VAE of the base model."""
        return self.build(latents.STAGE, self.config.latents, {"patches": accepted, **self.files.base(self.config)})

    def class_rows(self, accepted: Artifact, labels: Artifact) -> Artifact | None:
        """The classes of the base model nearest to the clusters; None unless fine-tuning starts from their rows."""
        init, base = self.config.finetune.class_row_init, self.files.base(self.config)["base"]
        inputs: dict[str, StageInput] = {"clusters": labels, "base": base}
        if init == "nearest_classes" or (init == "auto" and self.files.class_centers(self.config)):
            settings = self.config.class_rows.model_copy(update={"by": "centers"})
            return self.build(class_rows.STAGE, settings, {**inputs, "patches": accepted})
        if init == "clip_nearest":
            settings = self.config.class_rows.model_copy(update={"by": "names", "embeddings": self.config.embeddings})
            return self.build(class_rows.STAGE, settings, {**inputs, **self._clip()})
        return None

    def finetune(
        self,
        encoded: Artifact,
        labels: Artifact,
        rows: Artifact | None = None,
        earlier: Mapping[str, StageInput] | None = None,
    ) -> Artifact:
        """The adapter of the base model: DiffFit, minimax losses and L_SR.

        Args:
            earlier: ``from_adapter`` and ``from_clusters``: an adapter to continue from, and its clusters.
        """
        models = {**self.files.base(self.config), **self.files.lsr_decoder(self.config)}
        learned: dict[str, StageInput] = {"latents": encoded, "clusters": labels, **models, **_given(rows=rows)}
        inputs = {**learned, **(earlier or {})}
        return self.build(finetune.STAGE, self.config.finetune, inputs)

    # II-C: sampling

    def teacher(self, accepted: Artifact) -> Artifact | None:
        """The SR network that candidates are ranked by and detail is restored by; None if the config needs none."""
        return self._teacher(accepted) if self.config.sample.needs_teacher else None

    def sample(
        self, adapter: Artifact, labels: PseudoLabels, encoded: Artifact, teacher: Artifact | None = None
    ) -> Artifact:
        """The distilled set: images sampled from the fine-tuned model and selected."""
        start = {"latents": encoded} if self.config.sample.strength < 1 else {}
        inputs: dict[str, StageInput] = {
            "adapter": adapter, "clusters": labels.clusters, "embeddings": labels.embeddings, "patches": labels.patches,
            **self._clip(), **self.files.base(self.config), **start, **_given(teacher=teacher),
        }  # fmt: skip
        return self.build(sample.STAGE, self.config.sample, inputs)

    # III: training sets to compare with, and SR networks

    def crops(self, photos: Source) -> Artifact:
        """As many random crops of the photos as there are distilled images."""
        return self.build(crops.STAGE, self._crops("random", self.config.sample.count), {"photos": photos}, "random crops")

    def accepted_crops(self, accepted: Artifact) -> Artifact:
        """As many accepted patches, chosen at random, as there are distilled images."""
        config = self._crops("threshold", self.config.sample.count)
        return self.build(crops.STAGE, config, {"patches": accepted}, "threshold crops")

    def restore(self, real: Artifact, accepted: Artifact, label: str) -> Artifact:
        """Crops whose detail the teacher has replaced: as much as in the distilled images, or all if none was there."""
        share = self.config.sample.detail_restoration or 1.0
        config = RestoreConfig(detail_restoration=share, kernel=self.config.patches.kernel)
        inputs: dict[str, StageInput] = {"crops": real, "teacher": self._teacher(accepted)}
        return self.build(restore.STAGE, config, inputs, label)

    def subset(self, kind: str, photos: Source) -> Artifact:
        """A choice by k-center, HDC or loss ranking among `POOL_FACTOR` times as many random crops."""
        count, seed = self.config.sample.count, self.config.sr.seeds[0]
        pool = self.build(crops.STAGE, self._crops("random", count * POOL_FACTOR), {"photos": photos}, "pool of crops")
        values = {
            "kind": kind, "count": count, "seed": seed, "embeddings": self.config.embeddings, "scale": self.config.scale,
        }  # fmt: skip
        chosen = SubsetConfig.model_validate(values)
        inputs: dict[str, StageInput] = {"pool": pool, **self._clip()}
        return self.build(subset.STAGE, chosen, inputs, f"{kind} crops")

    def gsdd(self, labels: PseudoLabels) -> Artifact:
        """GSDD with the pseudo labels as its classes, and a generator trained on the accepted patches."""
        generator = self.train_sr(self.config.gsdd_generator, labels.patches, "generator of gsdd")
        update = {"count": self.config.sample.count, "seed": self.config.sr.seeds[0]}
        settings = self.config.gsdd.model_copy(update=update)
        inputs: dict[str, StageInput] = {"patches": labels.patches, "clusters": labels.clusters, "generator": generator}
        return self.build(gsdd.STAGE, settings, inputs, "gsdd")

    def train_sr(
        self, recipe: TrainSRConfig, images: StageInput, label: str, more: Mapping[str, StageInput] | None = None
    ) -> Artifact:
        """An SR network trained on ``images``; ``more`` are the inputs ``test`` of a validation and ``init``."""
        return self.build(train_sr.STAGE, recipe, {**self.training_inputs(recipe, images), **(more or {})}, label)

    def training_inputs(self, recipe: TrainSRConfig, images: StageInput) -> dict[str, StageInput]:
        """The inputs of `train_sr`."""
        return {"data": images, **self.files.trunk(recipe)}

    def evaluate(self, tests: StageInput, weights: StageInput | None = None, label: str = "bicubic") -> Artifact:
        """PSNR, SSIM and LPIPS of a network on the test photos, or of bicubic upscaling."""
        config = self.config.evaluate
        if isinstance(weights, Artifact) and weights.manifest.stage == train_sr.STAGE.name:
            config = trusting(config, weights.manifest.config["arch"])
        return self.build(evaluate.STAGE, config, {"test": tests, **_given(weights=weights)}, label)

    # what they share

    def build(self, stage: Stage, config: StageConfig, inputs: Mapping[str, StageInput], label: str = "") -> Artifact:
        """Build or find one stage, and append it to ``runs``."""
        self.log(f"{stage.name} {label}: begins, key {stage.key(config, inputs)}")
        artifact, found = self.backend.build(stage, config, inputs, label)
        used_before = any(run.artifact.key == artifact.key for run in self.runs)
        cached = found and (used_before or artifact.manifest.created < self.begun)  # else a worker of this run has built it
        self.log(f"{stage.name} {label}: {'from cache' if cached else 'built'}, {artifact.manifest.bytes} bytes")
        self.runs.append(StageRun(label or stage.name, artifact, cached))
        return artifact

    def run_of(self, stage: Stage) -> StageRun:
        """The first artifact that the run has built of a stage."""
        return next(run for run in self.runs if run.artifact.manifest.stage == stage.name)

    def _teacher(self, accepted: Artifact) -> Artifact:
        return self.train_sr(self.config.teacher, accepted, TEACHER)

    def _clip(self) -> dict[str, Source]:
        return self.files.clip(self.config.embeddings)

    def _crops(self, kind: str, count: int) -> CropsConfig:
        cut = self.config.patches
        values = {"kind": kind, "count": count, "patch_px": cut.patch_px, "kernel": cut.kernel, "scale": self.config.scale}
        return CropsConfig.model_validate({**values, "seed": self.config.sr.seeds[0]})


def trusting(config: EvaluateConfig, arch: str) -> EvaluateConfig:
    """The config with a network of the user's own (``module:Class``) that was trained here among those it may import."""
    return config if arch in ARCHITECTURES else config.model_copy(update={"trust": (*config.trust, arch)})


def _given(**inputs: StageInput | None) -> dict[str, StageInput]:
    """The inputs that are not None."""
    return {name: item for name, item in inputs.items() if item is not None}


def require_patches(config: PipelineConfig, accepted: int | None) -> None:
    """Check, before anything is embedded, that there are enough accepted patches for the clusters.

    Raises:
        ConfigError: there are fewer.
    """
    if accepted is not None and accepted < config.clusters.k:
        raise ConfigError(
            f"{accepted} patches were accepted, for {config.clusters.k} clusters",
            where="clusters.k",
            fix="add photos, accept more patches (patches.quantile or patches.threshold_db), or lower clusters.k",
        )
