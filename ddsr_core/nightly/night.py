"""A night's work: look what has changed, distill again, and let the result challenge the champion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from ddsr_core.config import digest_of
from ddsr_core.diffusion import finetune
from ddsr_core.errors import ConfigError, InputError, StorageError
from ddsr_core.imaging.photos import photo_digests, photo_source
from ddsr_core.nightly.registry import (
    Metric,
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
    """What is distilled and what for.

    Attributes:
        name: of the series, ``nightly/<name>`` in the home.
        margin: how much worse than the champion a challenger may be, in the metric's unit.
        warm_steps: optimizer steps of a fine-tuning that goes on from the last adapter; none: as many as from the base.
        warm: go on from the last adapter; else always from the base.
    """

    name: str
    images: Path
    test: Path
    config: PipelineConfig
    metric: Metric
    margin: float
    warm: bool
    warm_steps: int | None


@dataclass(frozen=True)
class Outcome:
    """What a night came to: the new version, or none where nothing had changed, and the registry now."""

    version: Version | None
    before: Registry
    after: Registry


@dataclass(frozen=True)
class Seen:
    """What is there tonight: photos and test photos by name, with the digests of their contents, and of the settings."""

    photos: dict[str, str]
    test: dict[str, str]
    config: str

    @property
    def facts(self) -> tuple[str, str, str]:
        """As in `Version`: digests of the photos, of the test photos (names and doubles do not count), of the settings."""
        return digest_of(sorted(set(self.photos.values()))), digest_of(sorted(set(self.test.values()))), self.config


def photo_cache_of(name: str) -> str:
    """The photo_cache of a series, relative to the home."""
    return f"{folder_of(name)}/photo_cache"


def challenge(night: Night, store: Store, backend: Backend, log: Callable[[str], None] | None = None) -> Outcome:
    """Distill again if photos, test photos or settings have changed, and decide whether the result is promoted.

    One night of a name at a time: another one waits, and then finds what the first has made.

    Args:
        backend: with the photo cache of `photo_cache_of`: known photos and patches are not scored and embedded again.
        log: takes a line when a stage begins and ends; none: the log of the version's run.

    Raises:
        ConfigError: no network to measure with, or a metric that is not measured.
        InputError: no photos, or none that can be used.
        StorageError: an artifact of the champion is gone.
    """
    require_measurable(night)
    with store.locked(night_lock(night.name), night.name, f"a night of {night.name!r}, begun"):
        registry, seen = read_registry(store, night.name), look(night)
        if is_unchanged(registry, seen):
            repair_current(store, night.name)
            return Outcome(None, registry, registry)
        run = f"{night.name}-{registry.next_number:04d}"
        log = log or run_log(store, run)
        with failure_noted(store, run):
            pins = Pins(store, run)
            outcome = distill_and_compare(night, store, Stages(night.config, pins.over(backend), log), registry, seen, run)
        pins.drop()
        return outcome


def unchanged(night: Night, store: Store) -> Outcome | None:
    """What a night comes to where nothing has changed; None where it has: there is work to do.

    Raises:
        As `challenge`.
    """
    require_measurable(night)
    registry = read_registry(store, night.name)
    if not is_unchanged(registry, look(night)):
        return None
    repair_current(store, night.name)
    return Outcome(None, registry, registry)


def is_unchanged(registry: Registry, seen: Seen) -> bool:
    """Whether the last version was made of what is there tonight."""
    last = registry.last
    return last is not None and (last.photos, last.test, last.config) == seen.facts


def require_measurable(night: Night) -> None:
    """
    Raises:
        ConfigError: no SR network, or a metric that is left out.
    """
    if not night.config.sr.archs:
        raise ConfigError("a challenger is measured by SR networks", where="config.sr.archs", fix="name at least one")
    if night.metric == "lpips" and not night.config.evaluate.lpips:
        fix = "set evaluate.lpips=true, or choose another metric"
        raise ConfigError("lpips is not measured", where="config.evaluate.lpips", fix=fix)


def look(night: Night) -> Seen:
    """Read photos, test photos and settings.

    Raises:
        InputError: no photos, or no base model.
    """
    return Seen(dict(photo_digests(night.images)), dict(photo_digests(night.test)), settings_of(night))


def distill_and_compare(night: Night, store: Store, stages: Stages, registry: Registry, seen: Seen, run: str) -> Outcome:
    """A whole night, from the photos to the new registry."""
    last, number = registry.last, registry.next_number
    config, earlier = warm_start(night, store, registry.current, stages)
    stages, tests = stages.with_config(config), photo_source(night.test)
    start_run(store, run, config, night.images, night.test)
    distilled = distill(stages, photo_source(night.images), earlier)
    require_same_photos(store, distilled.labels.patches, seen)
    comparison = compare_training_sets(stages, distilled, tests)
    score = score_of(stages, tests, night.metric, distilled.images, "challenger")
    against = champions_score(stages, tests, night.metric, store, registry)
    finish_run(store, run, stages, distilled, comparison)
    photos, test, settings = seen.facts
    version = Version(
        number=number, run=run, made=now(), photos=photos, test=test, config=settings,
        changes=changes_since(store, night.name, last, seen, distilled.labels.clusters), keys=keys_of(stages, distilled),
        anew=made_anew(stages, len(set(seen.photos.values()))),
        warm_from=registry.champion if earlier else None, metric=night.metric, score=score, against=against,
        promoted=False, reason="not compared yet",
    )  # fmt: skip
    write_photos(store, night.name, number, seen.photos)
    while True:
        with changing(store, night.name) as newest:
            if newest == registry:
                return promote(night, store, registry, version, distilled.images, stages.log)
        if newest.versions != registry.versions:
            what = f"another night has made version {number} meanwhile"
            raise StorageError(what, where=f"{store.url}/{folder_of(night.name)}", fix="run again: finished stages are kept")
        registry = newest  # rolled back meanwhile: another champion is to be beaten
        version = version.model_copy(update={"against": champions_score(stages, tests, night.metric, store, registry)})


def promote(
    night: Night, store: Store, registry: Registry, version: Version, distilled: Artifact, log: Callable[[str], None]
) -> Outcome:
    """Judge a version, put it into the registry, and its set into use if it is promoted."""
    promoted, reason = should_promote(night.metric, version.score, version.against, night.margin)
    version = version.model_copy(update={"promoted": promoted, "reason": reason})
    log(f"version {version.number}: {'promoted' if promoted else 'not promoted'}: {reason}")
    after = registry.with_version(version)
    if promoted:  # first: if this is cut off, the next night finds the version missing and does it again
        publish_current(store, night.name, distilled)
    write_registry(store, night.name, after)
    return Outcome(version, registry, after)


def settings_of(night: Night, files: ModelFiles | None = None) -> str:
    """Digest of what a night's result depends on besides the photos: config, code of the stages, weights it starts from."""
    weights = (files or ModelFiles()).all_of(night.config)
    versions = {stage.name: stage.version for stage in STAGES.values() if stage.section in DISTILLING}
    digests = {name: source.digest for name, source in weights.items()}
    return digest_of([night.config.model_dump(mode="json"), night.warm_steps, night.metric, versions, digests])


def warm_start(
    night: Night, store: Store, champion: Version | None, stages: Stages
) -> tuple[PipelineConfig, Mapping[str, StageInput] | None]:
    """The night's config and the adapter to go on from: that of the champion, if it was made with the same settings."""
    config = night.config
    if not night.warm or champion is None or champion.config != settings_of(night, stages.files):
        stages.log("fine-tuning starts from the base")
        return config, None
    if night.warm_steps is not None:
        shorter = config.finetune.model_copy(update={"steps": night.warm_steps, "epochs": None})
        config = config.model_copy(update={"finetune": shorter})
    stages.log(f"fine-tuning goes on from version {champion.number}")
    return config, {
        "from_adapter": kept(store, finetune.STAGE.name, champion),
        "from_clusters": kept(store, clusters.STAGE.name, champion),
    }


def require_same_photos(store: Store, accepted: Artifact, seen: Seen) -> None:
    """Patches must be of the photos that were looked at: the folder may have been written to since.

    Raises:
        InputError: they are not. The patches are removed, as their key names other photos.
    """
    import pyarrow.parquet as pq

    column = pq.read_table(accepted.path / "scores.parquet", columns=["photo_digest"])["photo_digest"]
    if not set(column.unique().to_pylist()) <= set(seen.photos.values()):
        store.forget(accepted)
        fix = "start the night when nobody writes to the photos; finished stages are kept"
        raise InputError("photos were changed while they were read", where=accepted.path.name, fix=fix)


def kept(store: Store, stage: str, version: Version) -> Artifact:
    """An artifact of an earlier version.

    Raises:
        StorageError: it is gone or damaged.
    """
    found = store.find(stage, version.keys[stage])
    if found is None:
        raise StorageError(
            f"version {version.number} has lost its {stage} artifact",
            where=store.folder(stage, version.keys[stage]),
            fix="bring it back from a back-up; or fine-tune from the base (--cold)"
            if stage != sampling.STAGE.name
            else "bring it back from a back-up; or put another version in use: `ddsr versions`, `ddsr rollback`",
        )
    return found


def score_of(stages: Stages, tests: Source, metric: Metric, images: Artifact, whose: str) -> float:
    """Mean over networks and seeds of the metric, for SR networks trained on a set by the night's recipe."""
    values, recipes = [], stages.config.sr
    for arch in recipes.archs:
        for seed in recipes.seeds:
            label = f"{arch} {whose}"
            weights = stages.train_sr(recipes.recipe(arch, seed), images, label)
            values.append(stages.evaluate(tests, weights, label).manifest.counts["metrics"][metric])
    return mean(values)


def champions_score(stages: Stages, tests: Source, metric: Metric, store: Store, registry: Registry) -> float | None:
    """Of the champion's set, measured anew where test photos or recipe have changed, else from the cache."""
    if registry.current is None:
        return None
    return score_of(stages, tests, metric, kept(store, sampling.STAGE.name, registry.current), "champion")


def keys_of(stages: Stages, distilled: Distilled) -> dict[str, str]:
    """Keys of the artifacts that later nights go on from."""
    adapter = stages.run_of(finetune.STAGE).artifact
    artifacts = (distilled.labels.clusters, adapter, distilled.images)
    return {artifact.manifest.stage: artifact.key for artifact in artifacts}


def made_anew(stages: Stages, photos: int) -> dict[str, int]:
    """Of how many of the night's photos and patches scores and vectors were not known yet."""
    scored, embedded = (stages.run_of(stage) for stage in (patches.STAGE, embeddings.STAGE))
    vectors = embedded.artifact.manifest.counts
    return {
        "photos": 0 if scored.cached else photos - scored.artifact.manifest.counts["from_photo_cache"],
        "patches": 0 if embedded.cached else vectors["patches"] - vectors["from_photo_cache"],
    }


def changes_since(store: Store, name: str, last: Version | None, seen: Seen, labels: Artifact) -> dict[str, dict[str, int]]:
    """Photos and accepted patches that are new, kept and dropped since the last version, as far as that is still known."""
    earlier = read_photos(store, name, last.number) if last else {}
    old = store.find(clusters.STAGE.name, last.keys[clusters.STAGE.name]) if last else None
    found = {} if earlier is None else {"photos": compare(set(earlier.values()), set(seen.photos.values()))}
    if last is None or old is not None:
        found["patches"] = compare(patch_ids(old) if old else set(), patch_ids(labels))
    return found


def compare(before: set[str], after: set[str]) -> dict[str, int]:
    """How many are new, kept and dropped."""
    return {"new": len(after - before), "kept": len(after & before), "dropped": len(before - after)}


def patch_ids(labels: Artifact) -> set[str]:
    """The patches of a clusters artifact."""
    import pyarrow.parquet as pq

    return set(pq.read_table(labels.path / "labels.parquet", columns=["patch_id"])["patch_id"].to_pylist())


def publish_current(store: Store, name: str, distilled: Artifact) -> None:
    """Put a set where those who train on it find it: ``nightly/<name>/current``."""
    folder = store.home / folder_of(name)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        publish_distilled(distilled, folder / "current", copies=True)
    store.push(f"{folder_of(name)}/current", mirror=True)


def repair_current(store: Store, name: str) -> None:
    """Put the champion's set in its place where something else lies there, or nothing, as after a kill."""
    with changing(store, name) as registry:
        if registry.current is None:
            return
        artifact = kept(store, sampling.STAGE.name, registry.current)
        wanted = {path: entry.bytes for path, entry in artifact.manifest.files.items()}
        if store.sizes(f"{folder_of(name)}/current") != wanted:
            publish_current(store, name, artifact)


def roll_back(store: Store, name: str, to: int | None = None) -> Registry:
    """Put an earlier version in the champion's place. While a night goes on, too: its challenger then meets that one.

    Raises:
        InputError: there is no such version.
        StorageError: its set is gone.
    """
    with changing(store, name) as before:
        registry = before.rolled_back(to)
        assert registry.current is not None
        publish_current(store, name, kept(store, sampling.STAGE.name, registry.current))
        write_registry(store, name, registry)
        return registry


def facts_of(outcome: Outcome, name: str) -> dict[str, Any]:
    """What a night came to, as plain data: the new version (none where nothing had changed), what is in use, a text."""
    version = None if outcome.version is None else outcome.version.model_dump(mode="json")
    return {"version": version, "champion": outcome.after.champion, "text": as_markdown(outcome, name)}


def as_markdown(outcome: Outcome, name: str) -> str:
    """Before and after, for the Prefect UI and the command line."""
    if outcome.version is None:
        assert outcome.before.last is not None
        champion = outcome.before.current
        return f"**{name}**: nothing has changed since version {outcome.before.last.number}; in use: version " + (
            f"{champion.number}.\n" if champion else "none.\n"
        )
    version, before = outcome.version, outcome.before.current
    lines = [
        f"**{name}**, version {version.number}: {'promoted' if version.promoted else 'not promoted'}. {version.reason}.",
        "", "| | before | after |", "| --- | --- | --- |",
        f"| set in use | {f'version {before.number}' if before else 'none'} | version {outcome.after.champion} |",
        f"| {version.metric} of SR networks | {scored(before, version.against)} | {scored(version, version.score)} |",
    ]  # fmt: skip
    for what, counts in version.changes.items():
        new = counts["kept"] + counts["new"]
        done = f"{'scored' if what == 'photos' else 'embedded'} anew: {version.anew[what]}"
        lines.append(
            f"| {'accepted patches' if what == 'patches' else what} | {counts['kept'] + counts['dropped']} "
            f"| {new} ({counts['new']} new, {counts['dropped']} dropped; {done}) |"
        )
    start = "the base" if version.warm_from is None else f"the adapter of version {version.warm_from}"
    return "\n".join([*lines, "", f"Fine-tuned from {start}. Run and report: `runs/{version.run}`.", ""])


def scored(version: Version | None, score: float | None) -> str:
    """A cell of the table: a score and whose it is."""
    return "" if version is None or score is None else f"{score:.4f} (version {version.number})"
