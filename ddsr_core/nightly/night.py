"""One night of a series: find what has changed, distill again, and promote the result unless it is worse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow.parquet as pq

from ddsr_core.config import digest_of
from ddsr_core.diffusion import finetune
from ddsr_core.errors import ConfigError, InputError, StorageError
from ddsr_core.imaging.hold_out import Separated, keep_apart
from ddsr_core.metrics.spec import METRICS, MetricName
from ddsr_core.nightly.registry import (
    Registry,
    Version,
    changing,
    folder_of,
    night_lock,
    read_photos,
    read_registry,
    should_promote,
    write_photos,
    write_registry,
)
from ddsr_core.pipeline.config import PipelineConfig
from ddsr_core.pipeline.distill import compare as compare_training_sets
from ddsr_core.pipeline.distill import distill
from ddsr_core.pipeline.model_files import ModelFiles
from ddsr_core.pipeline.pins import Pins
from ddsr_core.pipeline.preflight import left_out_notices
from ddsr_core.pipeline.request import Execution
from ddsr_core.pipeline.run import give_notice, require_one_machine
from ddsr_core.pipeline.run_state import failure_noted, finish_run, publish_distilled, run_log, start_run
from ddsr_core.pipeline.stages import Backend, Distilled, Stages
from ddsr_core.pseudo_labels import clusters, embeddings, patches
from ddsr_core.sampling import sample as sampling
from ddsr_core.stages import STAGES
from ddsr_core.storage.files import now, storage_errors
from ddsr_core.storage.stage import Artifact, Source, StageInput
from ddsr_core.storage.store import Store

#: Sections of the paper whose stages decide what is distilled.
DISTILLING = ("II-A", "II-B", "II-C")


@dataclass(frozen=True)
class Night:
    """What is distilled, and how the result is compared with the active version.

    Attributes:
        name: of the series, ``nightly/<name>`` in the home.
        images: training photos.
        test: test photos, on which SR networks trained on the candidate and on the active version are compared.
        metric: metric that they are compared by.
        margin: how much worse than the active version a candidate may be, in the unit of the metric.
        warm: continue fine-tuning from the adapter of the active version; else always from the base model.
        warm_steps: optimizer steps of a fine-tuning that continues; None: as many as from the base model.
        execution: where it computes.
    """

    name: str
    images: Path
    test: Path
    config: PipelineConfig
    metric: MetricName
    margin: float
    warm: bool
    warm_steps: int | None
    execution: Execution = field(default_factory=Execution)


@dataclass(frozen=True)
class Outcome:
    """The result of a night: the new version (None if nothing had changed), and the registry before and after it."""

    version: Version | None
    before: Registry
    after: Registry


@dataclass(frozen=True)
class Inputs:
    """The inputs of a night: training and test photos without a common picture, and the digest of the settings."""

    apart: Separated
    config: str

    @property
    def photos(self) -> dict[str, str]:
        """Name of each training photo -> digest of its content."""
        return dict(self.apart.photos)

    @property
    def digests(self) -> tuple[str, str, str]:
        """As in `Version`: of the photos, of the test photos (names and duplicates do not count), and of the settings."""
        photos, tests = ({digest for _, digest in pairs} for pairs in (self.apart.photos, self.apart.tests))
        return digest_of(sorted(photos)), digest_of(sorted(tests)), self.config


def photo_cache_of(name: str) -> str:
    """The photo cache of a series, relative to the home."""
    return f"{folder_of(name)}/photo_cache"


def run_night(night: Night, store: Store, backend: Backend, log: Callable[[str], None] | None = None) -> Outcome:
    """Distill again if photos, test photos or settings have changed, and decide whether the result is promoted.

    A series has one night at a time: a second one waits, and then finds that nothing has changed.

    Args:
        backend: with the photo cache of `photo_cache_of`, so that known photos are not scored and embedded again.
        log: takes a line when a stage begins and ends; None: the log of the version's run.

    Raises:
        ConfigError: no network to measure with, or a metric that is not measured.
        InputError: no photos, or none that can be used.
        StorageError: an artifact of the active version is missing.
    """
    require_measurable(night)
    with store.locked(night_lock(night.name), night.name, f"a night of {night.name!r}, begun"):
        registry, inputs = read_registry(store, night.name), read_inputs(night, store)
        if is_unchanged(registry, inputs):
            repair_current(store, night.name)
            return Outcome(None, registry, registry)
        run = f"{night.name}-{registry.next_number:04d}"
        log = log or run_log(store, run)
        with failure_noted(store, run):
            pins = Pins(store, run)
            stages = Stages(night.config, pins.over(backend), log)
            outcome = distill_and_compare(night, store, stages, registry, inputs, run)
        pins.drop()
        return outcome


def outcome_if_unchanged(night: Night, store: Store) -> Outcome | None:
    """The result of a night if nothing has changed; None if there is work to do.

    Raises:
        ConfigError, InputError, StorageError: as `run_night`.
    """
    require_measurable(night)
    registry = read_registry(store, night.name)
    if not is_unchanged(registry, read_inputs(night, store)):
        return None
    repair_current(store, night.name)
    return Outcome(None, registry, registry)


def is_unchanged(registry: Registry, inputs: Inputs) -> bool:
    """Whether the last version was made from these inputs."""
    last = registry.last
    return last is not None and (last.photos, last.test, last.config) == inputs.digests


def require_measurable(night: Night) -> None:
    """Check that the versions of a night can be compared.

    Raises:
        ConfigError: no SR network, or a metric that is not measured.
    """
    if not night.config.sr.archs:
        raise ConfigError("versions are compared by SR networks", where="sr.archs", fix="Name at least one network.")
    if night.metric not in night.config.evaluate.metrics:
        fix = f"Set evaluate.{night.metric}=true, or choose another metric."
        raise ConfigError(f"{METRICS[night.metric].label} is not measured", where=f"evaluate.{night.metric}", fix=fix)


def read_inputs(night: Night, store: Store) -> Inputs:
    """Hash photos, test photos and settings. Training photos that are also test photos are left out.

    Raises:
        ConfigError: all training photos are test photos, or some are and other machines take part.
        InputError: no photos, or no base model.
    """
    apart = keep_apart(night.images, night.test, store.home)
    if apart.left_out:
        require_one_machine(night.execution, store, len(apart.left_out))
    return Inputs(apart, settings_of(night))


def distill_and_compare(night: Night, store: Store, stages: Stages, registry: Registry, inputs: Inputs, run: str) -> Outcome:
    """Make a new version and compare it, from the photos to the new registry."""
    last, number = registry.last, registry.next_number
    config, earlier = warm_start(night, store, registry.active_version, stages)
    stages, apart = stages.with_config(config), inputs.apart
    tests = apart.test
    start_run(store, run, config, night.images, night.test, left_out=len(apart.left_out))
    give_notice(stages, left_out_notices(apart.left_out))
    distilled = distill(stages, apart.train, earlier)
    require_same_photos(store, distilled.labels.patches, inputs)
    comparison = compare_training_sets(stages, distilled, tests)
    score = score_of(stages, tests, night.metric, distilled.images, "candidate")
    against = active_score(stages, tests, night.metric, store, registry)
    finish_run(store, run, stages, distilled, comparison)
    photos, test, settings = inputs.digests
    version = Version(
        number=number, run=run, made=now(), photos=photos, test=test, config=settings,
        changes=changes_since(store, night.name, last, inputs, distilled.labels.clusters), keys=keys_of(stages, distilled),
        anew=counts_anew(stages, len(set(inputs.photos.values()))),
        warm_from=registry.active if earlier else None, metric=night.metric, score=score, against=against,
        promoted=False, reason="not compared yet",
    )  # fmt: skip
    write_photos(store, night.name, number, inputs.photos)
    while True:
        with changing(store, night.name) as newest:
            if newest == registry:
                return promote(night, store, registry, version, distilled.images, stages.log)
        if newest.versions != registry.versions:
            what = f"another night has made version {number} in the meantime"
            raise StorageError(
                what, where=f"{store.url}/{folder_of(night.name)}", fix="Run again; finished stages are kept."
            )
        registry = newest  # a rollback in the meantime: compare with the version that is active now
        version = version.model_copy(update={"against": active_score(stages, tests, night.metric, store, registry)})


def promote(
    night: Night, store: Store, registry: Registry, version: Version, distilled: Artifact, log: Callable[[str], None]
) -> Outcome:
    """Decide on a version, add it to the registry, and publish its set if it is promoted."""
    promoted, reason = should_promote(night.metric, version.score, version.against, night.margin)
    version = version.model_copy(update={"promoted": promoted, "reason": reason})
    log(f"version {version.number}: {'promoted' if promoted else 'not promoted'}: {reason}")
    after = registry.with_version(version)
    if promoted:  # before the registry: if this is interrupted, the next night finds no version and repeats the work
        publish_current(store, night.name, distilled)
    write_registry(store, night.name, after)
    return Outcome(version, registry, after)


def settings_of(night: Night, files: ModelFiles | None = None) -> str:
    """Digest of everything but photos that a version depends on: config, versions of the stages, pretrained weights."""
    weights = (files or ModelFiles()).all_of(night.config)
    versions = {stage.name: stage.version for stage in STAGES.values() if stage.section in DISTILLING}
    digests = {name: source.digest for name, source in weights.items()}
    return digest_of([night.config.canonical(), night.warm_steps, night.metric, versions, digests])


def warm_start(
    night: Night, store: Store, active: Version | None, stages: Stages
) -> tuple[PipelineConfig, Mapping[str, StageInput] | None]:
    """The config, and the adapter to continue from: that of the active version, if it was made with the same settings."""
    config = night.config
    if not night.warm or active is None or active.config != settings_of(night, stages.files):
        stages.log("fine-tuning starts from the base model")
        return config, None
    if night.warm_steps is not None:
        shorter = config.finetune.model_copy(update={"steps": night.warm_steps, "epochs": None})
        config = config.model_copy(update={"finetune": shorter})
    stages.log(f"fine-tuning continues from version {active.number}")
    return config, {
        "from_adapter": artifact_of(store, finetune.STAGE.name, active),
        "from_clusters": artifact_of(store, clusters.STAGE.name, active),
    }


def require_same_photos(store: Store, accepted: Artifact, inputs: Inputs) -> None:
    """Make sure that the patches are of the photos that were hashed: someone may have written to the folder since.

    Raises:
        InputError: they are not. The patches are removed, as their key names other photos.
    """
    column = pq.read_table(accepted.path / "scores.parquet", columns=["photo_digest"])["photo_digest"]
    if not set(column.unique().to_pylist()) <= set(inputs.photos.values()):
        store.forget(accepted)
        fix = "Run again while nothing writes to the photo folder; finished stages are kept."
        raise InputError("photos were changed while they were read", where=accepted.path.name, fix=fix)


def artifact_of(store: Store, stage: str, version: Version) -> Artifact:
    """An artifact of an earlier version.

    Raises:
        StorageError: it is missing or damaged.
    """
    artifact = store.find(stage, version.keys[stage])
    if artifact is None:
        instead = (
            "roll back to another version (`ddsr versions`, `ddsr rollback`)"
            if stage == sampling.STAGE.name
            else "fine-tune from the base model (--cold)"
        )
        raise StorageError(
            f"the {stage} artifact of version {version.number} is missing or damaged",
            where=store.folder(stage, version.keys[stage]),
            fix=f"Restore it from a backup, or {instead}.",
        )
    return artifact


def score_of(stages: Stages, tests: Source, metric: MetricName, images: Artifact, whose: str) -> float:
    """Mean of the metric over SR networks and seeds, trained on a set by the recipe of the night."""
    values, recipes = [], stages.config.sr
    for arch in recipes.archs:
        for seed in recipes.seeds:
            label = f"{arch} {whose}"
            weights = stages.train_sr(recipes.recipe(arch, seed), images, label)
            values.append(stages.evaluate(tests, weights, label).manifest.counts["metrics"][metric])
    return mean(values)


def active_score(stages: Stages, tests: Source, metric: MetricName, store: Store, registry: Registry) -> float | None:
    """`score_of` of the active version, which is measured again only if test photos or recipe have changed."""
    if registry.active_version is None:
        return None
    active = artifact_of(store, sampling.STAGE.name, registry.active_version)
    return score_of(stages, tests, metric, active, "active")


def keys_of(stages: Stages, distilled: Distilled) -> dict[str, str]:
    """Keys of the artifacts that later nights need."""
    adapter = stages.run_of(finetune.STAGE).artifact
    artifacts = (distilled.labels.clusters, adapter, distilled.images)
    return {artifact.manifest.stage: artifact.key for artifact in artifacts}


def counts_anew(stages: Stages, photos: int) -> dict[str, int]:
    """How many photos were scored and patches embedded this night, because they were not in the photo cache."""
    scored, embedded = (stages.run_of(stage) for stage in (patches.STAGE, embeddings.STAGE))
    vectors = embedded.artifact.manifest.counts
    return {
        "photos": 0 if scored.cached else photos - scored.artifact.manifest.counts["from_photo_cache"],
        "patches": 0 if embedded.cached else vectors["patches"] - vectors["from_photo_cache"],
    }


def changes_since(
    store: Store, name: str, last: Version | None, inputs: Inputs, labels: Artifact
) -> dict[str, dict[str, int]]:
    """Photos and accepted patches that are new, kept and dropped since the last version, as far as its records exist."""
    earlier = read_photos(store, name, last.number) if last else {}
    old = store.find(clusters.STAGE.name, last.keys[clusters.STAGE.name]) if last else None
    changes = {} if earlier is None else {"photos": compare(set(earlier.values()), set(inputs.photos.values()))}
    if last is None or old is not None:
        changes["patches"] = compare(patch_ids(old) if old else set(), patch_ids(labels))
    return changes


def compare(before: set[str], after: set[str]) -> dict[str, int]:
    """Numbers of new, kept and dropped items."""
    return {"new": len(after - before), "kept": len(after & before), "dropped": len(before - after)}


def patch_ids(labels: Artifact) -> set[str]:
    """The patches of a clusters artifact."""
    return set(pq.read_table(labels.path / "labels.parquet", columns=["patch_id"])["patch_id"].to_pylist())


def publish_current(store: Store, name: str, distilled: Artifact) -> None:
    """Publish a set as ``nightly/<name>/current``, for users who train on it."""
    folder = store.home / folder_of(name)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        publish_distilled(distilled, folder / "current")
    store.push(f"{folder_of(name)}/current", mirror=True)


def repair_current(store: Store, name: str) -> None:
    """Publish the set of the active version again if ``current`` differs from it, as after a kill."""
    with changing(store, name) as registry:
        if registry.active_version is None:
            return
        artifact = artifact_of(store, sampling.STAGE.name, registry.active_version)
        if not store.holds(f"{folder_of(name)}/current", artifact.manifest.files):
            publish_current(store, name, artifact)


def roll_back(store: Store, name: str, to: int | None = None) -> Registry:
    """Make an earlier version active again. A night that is running then compares its candidate with that version.

    Raises:
        InputError: there is no such version.
        StorageError: its set is missing.
    """
    with changing(store, name) as before:
        registry = before.rolled_back(to)
        assert registry.active_version is not None
        publish_current(store, name, artifact_of(store, sampling.STAGE.name, registry.active_version))
        write_registry(store, name, registry)
        return registry


def outcome_data(outcome: Outcome, name: str) -> dict[str, Any]:
    """The result of a night as plain data: the new version or None, the number of the active one, and a text."""
    version = None if outcome.version is None else outcome.version.model_dump(mode="json")
    return {"version": version, "active_version": outcome.after.active, "text": as_markdown(outcome, name)}


def as_markdown(outcome: Outcome, name: str) -> str:
    """Before and after, for the Prefect UI and the command line."""
    if outcome.version is None:
        assert outcome.before.last is not None
        active = "none" if outcome.before.active is None else f"version {outcome.before.active}"
        return f"**{name}**: nothing has changed since version {outcome.before.last.number}. Active: {active}.\n"
    version, before = outcome.version, outcome.before.active_version
    lines = [
        f"**{name}**, version {version.number}: {'promoted' if version.promoted else 'not promoted'}. {version.reason}.",
        "", "| | before | after |", "| --- | --- | --- |",
        f"| active | {_version_cell(outcome.before)} | {_version_cell(outcome.after)} |",
        f"| {METRICS[version.metric].label} of SR networks | {_score_cell(before, version.against)} "
        f"| {_score_cell(version, version.score)} |",
    ]  # fmt: skip
    for what, counts in version.changes.items():
        new = counts["kept"] + counts["new"]
        done = f"{version.anew[what]} {'scored' if what == 'photos' else 'embedded'} this night"
        lines.append(
            f"| {'accepted patches' if what == 'patches' else what} | {counts['kept'] + counts['dropped']} "
            f"| {new} ({counts['new']} new, {counts['dropped']} dropped; {done}) |"
        )
    start = "the base model" if version.warm_from is None else f"the adapter of version {version.warm_from}"
    return "\n".join([*lines, "", f"Fine-tuned from {start}. Run and report: `runs/{version.run}`.", ""])


def _version_cell(registry: Registry) -> str:
    return "none" if registry.active is None else f"version {registry.active}"


def _score_cell(version: Version | None, score: float | None) -> str:
    """A score and the version it belongs to."""
    return "" if version is None or score is None else f"{score:.4f} (version {version.number})"
