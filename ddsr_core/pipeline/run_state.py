"""What a run writes into its folder: run.json, config.toml, distilled/, report.html, report.json, tables/, logs/."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ddsr_core.baselines.names import label_of
from ddsr_core.errors import InputError, StorageError
from ddsr_core.pipeline.config import PipelineConfig, to_toml
from ddsr_core.pipeline.distill import Comparison, TrainedNetwork
from ddsr_core.pipeline.run_folder import (
    Stopped,
    check_run_name,
    parsed_state,
    published_state,
    read_config,
    read_run,
    run_folder,
    this_process,
)
from ddsr_core.pipeline.stages import Distilled, StageRun, Stages
from ddsr_core.report.card import write_data_card
from ddsr_core.report.html import write_report
from ddsr_core.report.record import RunRecord, SrRecord, StageRecord
from ddsr_core.storage.files import copy_file, now, sealed, storage_errors, write_atomically, write_json
from ddsr_core.storage.stage import Artifact
from ddsr_core.storage.store import LOG, Store

#: What of a run folder is needed to show it on another machine, beside its artifacts.
RUN_FILES = ("run.json", "config.toml")
#: What run.json says of a run from its start, and its report repeats.
BEGUN = ("images", "test", "started", "left_out")


@dataclass(frozen=True)
class Outcome:
    """What a finished run has to show.

    Attributes:
        run: its name.
        folder: the run folder.
        report: its report.html.
        table: one row per SR network, bicubic first.
        stages: one row per stage: name, key, seconds, cached.
        skipped: reason -> number of training photos that were skipped for it.
    """

    run: str
    folder: Path
    report: Path
    table: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    skipped: dict[str, int] = field(default_factory=dict)


def start_run(
    store: Store,
    name: str,
    config: PipelineConfig,
    images: Path,
    test: Path | None,
    identity: Mapping[str, str | None] | None = None,
    *,
    left_out: int = 0,
) -> Path:
    """Make the run folder and note in it that the run has begun. Artifacts of an earlier run of that name stay pinned.

    Args:
        identity: values of `ddsr_core.pipeline.run_folder.IDENTITY`.
        left_out: number of training photos that are left out because they are also test photos.

    Raises:
        ConfigError: as `check_run_name`.
        StorageError: the home cannot be written.
    """
    named = {"preset": config.preset, "images": str(images), "test": None if test is None else str(test)}
    return begin_step(store, name, config, {**named, "left_out": left_out, **(identity or {})})


def begin_step(store: Store, name: str, config: BaseModel, about: Mapping[str, str | int | None]) -> Path:
    """As `start_run`, for a run of a single step.

    Args:
        config: what its config.toml will say.
        about: more fields of run.json: its identity, and in words what it is.
    """
    check_run_name(name)
    folder = run_folder(store, name)
    before = published_state(store, name) or {}
    earlier = {stage["key"] for stage in before.get("stages", [])} | set(before.get("kept", []))
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        text = to_toml(config).encode()
        write_atomically(folder / "config.toml", text)
        state = {"name": name, "preset": "", **about, "status": "running", **this_process(), "started": now()}
        state |= {"config_digest": hashlib.sha256(text).hexdigest(), "kept": sorted(earlier)}
        write_json(folder / "run.json", sealed(state))
    store.push(f"runs/{name}")
    return folder


def run_log(store: Store, name: str) -> Callable[[str], None]:
    """Appends lines with the time to ``logs/run.log`` of a run."""
    path = run_folder(store, name) / "logs/run.log"

    def write(text: str) -> None:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(f"{now()} {text}\n")

    return write


def finish_run(store: Store, name: str, stages: Stages, distilled: Distilled, comparison: Comparison | None) -> Outcome:
    """Publish the distilled set below the run folder, write the report, and then note in run.json that all is done.

    Args:
        comparison: None if no SR network was trained.
    """
    folder = run_folder(store, name)
    with storage_errors(folder):
        publish_distilled(distilled.images, folder / "distilled")
        publish_networks(comparison.networks if comparison else (), folder / "networks")
        state = _over(_local_state(folder / "run.json"))
        begun: dict[str, Any] = {field: state[field] for field in BEGUN if field in state}
        record = to_record(name, stages, comparison).model_copy(update={**begun, "finished": now()})
        report = write_report(folder, record)
        write_data_card(folder / "distilled", record)
    written = portable(store, record.model_dump(mode="json", exclude={"config"}))
    _note_completed(store, name, {**state, **written})
    table, rows = results_table(comparison, record.restored), stage_rows(stages.runs)
    skipped = dict(distilled.labels.patches.manifest.counts.get("skipped", {}))
    return Outcome(name, folder, report, table, rows, skipped)


def complete_run(store: Store, name: str, stages: Iterable[StageRun]) -> None:
    """Note in run.json that a run which has no report is finished, and its stages; one that was used several times once."""
    records = {item.artifact.key: portable(store, _stage_record(item).model_dump(mode="json")) for item in stages}
    path = run_folder(store, name) / "run.json"
    with storage_errors(path):
        state = _over(_local_state(path))
    _note_completed(store, name, {**state, "finished": now(), "stages": list(records.values())})


def _note_completed(store: Store, name: str, state: Mapping[str, Any]) -> None:
    """The last step of a run: what it has made is published before any machine can read that it is completed."""
    store.push(f"runs/{name}", mirror=True)
    path = run_folder(store, name) / "run.json"
    with storage_errors(path):
        write_json(path, sealed({**state, "status": "completed"}))
    store.write_file(f"runs/{name}/run.json", path.read_bytes())


def portable(store: Store, value: Any) -> Any:
    """Plain data with paths of artifacts relative to the home, so that a home can be moved or copied."""
    if isinstance(value, dict):
        return {name: portable(store, item) for name, item in value.items()}
    if isinstance(value, list):
        return [portable(store, item) for item in value]
    root = f"{store.home}/artifacts/"
    return f"artifacts/{value.removeprefix(root)}" if isinstance(value, str) and value.startswith(root) else value


def _local_state(path: Path) -> dict[str, Any]:
    """run.json of a run that this machine works on."""
    return parsed_state(path.read_bytes(), path.parent.name, path)


def _over(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != "kept"}


@contextmanager
def failure_noted(store: Store, name: str) -> Iterator[None]:
    """Note in run.json why a run that goes on has stopped, whatever stopped it; the exception passes."""
    try:
        yield
    except KeyboardInterrupt:
        fail_run(store, name, "stopped by the user", "interrupted")
        raise
    except Exception as error:
        fail_run(store, name, str(error) or type(error).__name__)
        raise
    except BaseException as error:  # SIGTERM, as of a run that is cancelled in the Prefect UI
        fail_run(store, name, str(error) or type(error).__name__, "cancelled")
        raise


def fail_run(store: Store, name: str, message: str, status: Stopped = "failed") -> None:
    """Note in run.json why the run has stopped. One that was finished before it could begin again stays so."""
    path = run_folder(store, name) / "run.json"
    try:
        state = _local_state(path) if path.exists() else {}
        if state.get("status") != "running":
            return
        run_log(store, name)(f"{status}: {message}")
        write_json(path, sealed({**state, "status": status, "message": message, "finished": now()}))
        store.push(f"runs/{name}")
    except (StorageError, OSError) as error:  # most likely what the run has failed of
        LOG.warning("%s: that the run has failed is not noted: %s", path, error)


def to_record(name: str, stages: Stages, comparison: Comparison | None) -> RunRecord:
    """The run as the report reads it."""
    networks = comparison.networks if comparison else ()
    return RunRecord(
        name=name,
        preset=stages.config.preset,
        config=stages.config.model_dump(mode="json"),
        stages=tuple(_stage_record(item) for item in stages.runs),
        sr=tuple(_sr_record(item) for item in networks),
        bicubic_path=comparison.bicubic.artifact.path if comparison else None,
    )


def _sr_record(network: TrainedNetwork) -> SrRecord:
    counts = network.training.artifact.manifest.counts
    return SrRecord(
        arch=network.arch,
        source=network.source,
        budget=int(counts["images"]),
        iterations=int(counts["iterations"]),
        seed=network.seed,
        params=int(counts["params"]),
        train_path=network.training.artifact.path,
        evaluate_path=network.evaluation.artifact.path,
    )


def _stage_record(item: StageRun) -> StageRecord:
    manifest = item.artifact.manifest
    return StageRecord(
        name=manifest.stage if item.label == manifest.stage else f"{manifest.stage} ({item.label})",
        key=manifest.key,
        seconds=manifest.seconds,
        cached=item.cached,
        path=item.artifact.path,
        counts=manifest.counts,
    )


def stage_rows(runs: Iterable[StageRun]) -> list[dict[str, Any]]:
    """One row per stage for tables: name, key, seconds (of the build, whenever that was), cached."""
    records = (_stage_record(item) for item in runs)
    return [{"stage": r.name, "key": r.key, "seconds": r.seconds, "cached": r.cached} for r in records]


def results_table(comparison: Comparison | None, restored: bool) -> list[dict[str, Any]]:
    """One row per SR network, bicubic first: arch, source, label, metrics.

    Args:
        restored: whether detail was restored in the distilled images, which the label then says.
    """
    if comparison is None:
        return []
    rows = [{"arch": "bicubic", "source": "", "label": "", **comparison.bicubic.artifact.manifest.counts["metrics"]}]
    for item in comparison.networks:
        row = {"arch": item.arch, "source": item.source, "label": label_of(item.source, restored)}
        rows.append({**row, **item.evaluation.artifact.manifest.counts["metrics"]})
    return rows


def publish_distilled(artifact: Artifact, target: Path) -> None:
    """Put a copy of the distilled set into the run folder, all or nothing. Whoever edits it leaves the artifact as it is."""
    fresh, old = target.with_name(target.name + ".new"), target.with_name(target.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(artifact.path, fresh, copy_function=copy_file, ignore=shutil.ignore_patterns("manifest.json"))
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)  # it is gone for a moment only, however large it is
    os.rename(fresh, target)
    shutil.rmtree(old, ignore_errors=True)


def publish_networks(networks: Iterable[TrainedNetwork], target: Path) -> None:
    """Copy the weights of a run's SR networks to its folder, by names such as ``edsr-small-distilled.safetensors``.

    With several seeds, each name ends in ``-seed-N``.
    """
    networks = list(networks)
    shutil.rmtree(target, ignore_errors=True)
    several = len({network.seed for network in networks}) > 1
    for network in networks:
        target.mkdir(exist_ok=True)
        seed = f"-seed-{network.seed}" if several else ""
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{network.arch}-{network.source}{seed}")
        copy_file(network.training.artifact.path / "weights.safetensors", target / f"{name}.safetensors")


def read_record(store: Store, name: str) -> RunRecord:
    """A finished run as the report reads it; its run.json and config.toml are brought to this machine.

    Raises:
        InputError: no such run, it has not been finished, or it has no report.
        StorageError: a record or an artifact of the run is missing or damaged.
    """
    state = read_run(store, name)
    if "about" in state:
        raise InputError(f"a run of {state['kind']} has no report", where=name, fix=f"see `ddsr show {name}`")
    if state["status"] != "completed":
        raise InputError(f"the run is {state['status']}", where=name, fix="finish it first: run its command again")
    store.pull(f"runs/{name}", RUN_FILES)
    config = read_config(store, name)
    fields = {field: state[field] for field in RunRecord.model_fields if field in state}
    return _brought(store, RunRecord.model_validate({**fields, "config": config}))


def _brought(store: Store, record: RunRecord) -> RunRecord:
    """The record with the places that its artifacts have on this machine."""

    def here(item: RunRecord | StageRecord | SrRecord) -> dict[str, Path]:
        return {name: store.bring(value) for name, value in item if isinstance(value, Path)}

    stages = tuple(item.model_copy(update=here(item)) for item in record.stages)
    networks = tuple(item.model_copy(update=here(item)) for item in record.sr)
    return record.model_copy(update={**here(record), "stages": stages, "sr": networks})
