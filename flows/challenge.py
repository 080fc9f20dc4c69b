"""A night's work: look what has changed, distil again, and let the result challenge the champion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from ddsr_core import clusters, evaluation, sampling
from ddsr_core.config import digest_of
from ddsr_core.diffusion import finetune
from ddsr_core.errors import ConfigError, StorageError
from ddsr_core.images import photo_source
from ddsr_core.memo import read_changes
from ddsr_core.pipeline import PipelineConfig
from ddsr_core.registry import Metric, Registry, Version, folder_of, judge, read_registry, write_registry
from ddsr_core.sr import train
from ddsr_core.store import Artifact, StageInput, Store, now, storage_errors
from flows.chain import Build, Chain, distill, train_networks
from flows.runs import finish_run, publish_distilled, run_log, start_run


@dataclass(frozen=True)
class Night:
    """What is distilled and what for.

    Attributes:
        name: of the succession, ``nightly/<name>`` in the home.
        margin: how much worse than the champion a challenger may be, in the metric's unit.
        warm_steps: optimiser steps of a fine-tuning that goes on from the last adapter; none: as many as from the base.
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


def memo_of(name: str) -> str:
    """The memo of a succession, relative to the home."""
    return f"{folder_of(name)}/memo"


def challenge(night: Night, store: Store, build: Build, log: Callable[[str], None] | None = None) -> Outcome:
    """Distil again if photos, test photos or settings have changed since the last version, and judge the result.

    Args:
        build: with the memo of `memo_of`, so that known photos and patches are not scored and embedded again.
        log: takes a line when a stage begins and ends; none: the log of the version's run.

    Raises:
        ConfigError: no network to measure with.
        StorageError: an artifact of the champion is gone.
    """
    if not night.config.sr.archs:
        raise ConfigError("a challenger is measured by SR networks", where="config.sr.archs", mend="name at least one")
    registry = read_registry(store, night.name)
    photos, test = photo_source(night.images).digest, photo_source(night.test).digest
    settings = settings_of(night)
    last = registry.versions[-1] if registry.versions else None
    if last is not None and (last.photos, last.test, last.config) == (photos, test, settings):
        return Outcome(None, registry, registry)
    number = last.number + 1 if last is not None else 1
    run = f"{night.name}-{number:04d}"
    log = log or run_log(store, run)
    config, earlier = warm_start(night, store, last, log)
    start_run(store, run, config, night.images, night.test)
    chain = Chain(build, log)
    distilled, accepted = distill(chain, config, night.images, earlier)
    train_networks(chain, config, night.images, night.test, distilled, accepted)
    score = score_of(chain, config, night, distilled)
    against = champions_score(chain, config, night, store, registry)
    promoted, reason = judge(night.metric, score, against, night.margin)
    finish_run(store, run, config, chain)
    version = Version(
        number=number, run=run, made=now(), photos=photos, test=test, config=settings,
        changes=read_changes(store.home / memo_of(night.name)), keys=keys_of(chain),
        warm_from=last.number if earlier and last is not None else None, metric=night.metric, score=score,
        against=against, promoted=promoted, reason=reason,
    )  # fmt: skip
    log(f"version {number}: {'promoted' if promoted else 'not promoted'}: {reason}")
    after = registry.with_version(version)
    if promoted:
        publish_current(store, night.name, distilled)
    write_registry(store, night.name, after)
    return Outcome(version, registry, after)


def settings_of(night: Night) -> str:
    """Digest of what a night's result depends on besides the photos."""
    return digest_of([night.config.model_dump(mode="json"), night.warm_steps, night.metric])


def warm_start(
    night: Night, store: Store, last: Version | None, log: Callable[[str], None]
) -> tuple[PipelineConfig, Mapping[str, StageInput] | None]:
    """The night's config and the adapter to go on from: that of the last version, if it was made with the same settings."""
    config = night.config
    if not night.warm or last is None or last.config != settings_of(night):
        log("fine-tuning starts from the base")
        return config, None
    if night.warm_steps is not None:
        shorter = config.finetune.model_copy(update={"steps": night.warm_steps, "epochs": None})
        config = config.model_copy(update={"finetune": shorter})
    log(f"fine-tuning goes on from version {last.number}")
    return config, {
        "start": kept(store, finetune.STAGE.name, last),
        "start_clusters": kept(store, clusters.STAGE.name, last),
    }


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
            mend=f"bring it back from a back-up, or run `ddsr distill` with the config of runs/{version.run}",
        )
    return found


def score_of(chain: Chain, config: PipelineConfig, night: Night, images: Artifact) -> float:
    """Mean over networks and seeds of the metric, for SR networks trained on a set by the night's recipe."""
    tests, values = photo_source(night.test), []
    for arch in config.sr.archs:
        for seed in config.sr.seeds:
            recipe = config.sr.recipe(arch, seed)
            weights = chain.add(train.STAGE, recipe, f"{arch} judged", data=images, **train.trunk_input(recipe))
            measured = chain.add(evaluation.STAGE, config.evaluate, f"{arch} judged", weights=weights, test=tests)
            values.append(measured.manifest.counts["metrics"][night.metric])
    if None in values:
        raise ConfigError(
            f"{night.metric} was not measured", where="config.evaluate", mend=f"set evaluate.{night.metric}=true"
        )
    return mean(values)


def champions_score(chain: Chain, config: PipelineConfig, night: Night, store: Store, registry: Registry) -> float | None:
    """Of the champion's set, measured anew where test photos or recipe have changed, else from the cache."""
    champion = registry.current
    return None if champion is None else score_of(chain, config, night, kept(store, sampling.STAGE.name, champion))


def keys_of(chain: Chain) -> dict[str, str]:
    """Keys of the artifacts that later nights go on from."""
    stages = (clusters.STAGE.name, finetune.STAGE.name, sampling.STAGE.name)
    return {name: found.key for name in stages if (found := chain.named(name)) is not None}


def publish_current(store: Store, name: str, distilled: Artifact) -> None:
    """Put a set where those who train on it find it: ``nightly/<name>/current``."""
    folder = store.home / folder_of(name)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        publish_distilled(distilled, folder / "current")
    store.push(f"{folder_of(name)}/current", mirror=True)


def roll_back(store: Store, name: str, to: int | None = None) -> Registry:
    """Put an earlier version in the champion's place.

    Raises:
        InputError: there is no such version.
        StorageError: its set is gone.
    """
    registry = read_registry(store, name).rolled_back(to)
    assert registry.current is not None
    publish_current(store, name, kept(store, sampling.STAGE.name, registry.current))
    write_registry(store, name, registry)
    return registry


def as_markdown(outcome: Outcome, name: str) -> str:
    """Before and after, for the Prefect UI and the command line."""
    if outcome.version is None:
        champion = outcome.before.current
        return f"**{name}**: nothing has changed since version {outcome.before.versions[-1].number}; in use: version " + (
            f"{champion.number}.\n" if champion else "none.\n"
        )
    version, before = outcome.version, outcome.before.current
    lines = [
        f"**{name}**, version {version.number}: {'promoted' if version.promoted else 'not promoted'}. {version.reason}.",
        "", "| | before | after |", "| --- | --- | --- |",
        f"| in use | {f'version {before.number}' if before else 'none'} | version {outcome.after.champion} |",
        f"| {version.metric} | {'' if version.against is None else f'{version.against:.4f}'} | {version.score:.4f} |",
    ]  # fmt: skip
    for what, counts in version.changes.items():
        changed = f"{counts['new']} new, {counts['dropped']} dropped"
        lines.append(f"| {what} | {counts['kept'] + counts['dropped']} | {counts['kept'] + counts['new']} ({changed}) |")
    start = "the base" if version.warm_from is None else f"version {version.warm_from}"
    return "\n".join([*lines, "", f"Fine-tuned from {start}. Run: `{version.run}`.", ""])
