"""The run folder: ``<home>/runs/<name>/`` with run.json, config.toml, distilled/, report.html, report.json, tables/."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ddsr_core.errors import InputError, StorageError
from ddsr_core.pipeline import PipelineConfig, to_toml
from ddsr_core.report.data import RunRecord, SrRecord, StageRecord
from ddsr_core.store import Artifact, Store, storage_errors, write_atomically, write_json
from flows.chain import Built, Chain
from flows.claims import claimer, drop_claims

#: What of a run folder is needed to show it on another machine, beside its artifacts.
RUN_FILES = ("run.json", "config.toml")


@dataclass(frozen=True)
class Outcome:
    """What a finished run has to show.

    Attributes:
        folder: the run folder; ``report``: its report.html.
        table: one row an SR network (and bicubic).
        stages: one row a stage: name, key, seconds, cached.
    """

    folder: Path
    report: Path
    table: list[dict[str, Any]]
    stages: list[dict[str, Any]]


def run_folder(store: Store, name: str) -> Path:
    """``<home>/runs/<name>``."""
    return store.home / "runs" / name


def start_run(store: Store, name: str, config: PipelineConfig, images: Path, test: Path | None) -> Path:
    """Make the run folder and say in it that the run has begun. What an earlier run of that name has made is claimed.

    Raises:
        StorageError: the home cannot be written.
    """
    folder = run_folder(store, name)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "run.json").exists():
            earlier = json.loads((folder / "run.json").read_text()).get("stages", [])
            claimer(store, name)(*(stage["key"] for stage in earlier))
        write_atomically(folder / "config.toml", to_toml(config).encode())
        state = {"name": name, "preset": config.preset, "status": "running", "images": str(images), "test": str(test)}
        write_json(folder / "run.json", {**state, "started": _now()})
    store.push(f"runs/{name}")
    return folder


def run_log(store: Store, name: str) -> Callable[[str], None]:
    """Appends lines with the time to ``logs/run.log`` of a run."""
    path = run_folder(store, name) / "logs/run.log"

    def write(text: str) -> None:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(f"{_now()} {text}\n")

    return write


def finish_run(store: Store, name: str, config: PipelineConfig, chain: Chain) -> Outcome:
    """Publish the distilled set, write run.json and the report."""
    from ddsr_core.report import write_report

    folder = run_folder(store, name)
    record = to_record(name, config, chain)
    with storage_errors(folder):
        distilled = chain.named("sample")
        if distilled is not None:
            publish_distilled(distilled, folder / "distilled")
        started = json.loads((folder / "run.json").read_text())
        facts = record.model_dump(mode="json", exclude={"config"})
        write_json(folder / "run.json", {**started, **facts, "status": "completed", "finished": _now()})
        report = write_report(folder, record)
    drop_claims(store, name)
    store.push(f"runs/{name}", mirror=True)
    return Outcome(folder, report, results_table(chain), stage_rows(chain))


def fail_run(store: Store, name: str, message: str) -> None:
    """Note in run.json why the run has stopped."""
    path = run_folder(store, name) / "run.json"
    if path.exists():
        state = json.loads(path.read_text())
        run_log(store, name)(f"failed: {message}")
        write_json(path, {**state, "status": "failed", "message": message, "finished": _now()})
        try:
            store.push(f"runs/{name}")
        except StorageError as error:  # most likely what the run has failed of
            run_log(store, name)(f"run.json is not published: {error.what}")


def to_record(name: str, config: PipelineConfig, chain: Chain) -> RunRecord:
    """The run as the report reads it."""
    return RunRecord(
        name=name,
        preset=config.preset,
        config=config.model_dump(mode="json"),
        stages=tuple(_stage_record(item) for item in chain.stages),
        sr=tuple(
            SrRecord(
                arch=item.arch,
                source=item.source,
                budget=int(item.training.artifact.manifest.counts["images"]),
                iterations=int(item.training.artifact.manifest.counts["iterations"]),
                seed=item.seed,
                params=int(item.training.artifact.manifest.counts["params"]),
                train_path=item.training.artifact.path,
                evaluate_path=item.evaluation.artifact.path,
            )
            for item in chain.networks
        ),
        bicubic_path=chain.bicubic.artifact.path if chain.bicubic else None,
    )


def _stage_record(item: Built) -> StageRecord:
    manifest = item.artifact.manifest
    return StageRecord(
        name=manifest.stage if item.label == manifest.stage else f"{manifest.stage} ({item.label})",
        key=manifest.key,
        seconds=manifest.seconds,
        cached=item.cached,
        path=item.artifact.path,
        counts=manifest.counts,
    )


def stage_facts(stages: Iterable[Built]) -> list[dict[str, Any]]:
    """Every stage as run.json has it; one that was used several times once."""
    records = {item.artifact.key: _stage_record(item) for item in stages}
    return [record.model_dump(mode="json") for record in records.values()]


def stage_rows(chain: Chain) -> list[dict[str, Any]]:
    """One row a stage for tables: name, key, seconds (of the build, whenever it was), cached."""
    records = (_stage_record(item) for item in chain.stages)
    return [{"stage": r.name, "key": r.key, "seconds": r.seconds, "cached": r.cached} for r in records]


def results_table(chain: Chain) -> list[dict[str, Any]]:
    """One row an SR network, bicubic first: arch, source, metrics."""
    rows = []
    if chain.bicubic:
        rows.append({"arch": "bicubic", "source": "", **chain.bicubic.artifact.manifest.counts["metrics"]})
    for item in chain.networks:
        rows.append({"arch": item.arch, "source": item.source, **item.evaluation.artifact.manifest.counts["metrics"]})
    return rows


def publish_distilled(artifact: Artifact, target: Path, *, copies: bool = False) -> None:
    """Put the distilled set into the run folder: hard links where the file system can, else copies. All or nothing.

    Args:
        copies: never links: whoever changes a file of the set does not change the artifact.
    """
    fresh, old = target.with_name(target.name + ".new"), target.with_name(target.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    how = shutil.copyfile if copies else _link_or_copy
    shutil.copytree(artifact.path, fresh, copy_function=how, ignore=shutil.ignore_patterns("manifest.json"))
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)  # it is gone for a moment only, however large it is
    os.rename(fresh, target)
    shutil.rmtree(old, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def list_runs(store: Store) -> list[dict[str, Any]]:
    """run.json of every run, oldest first."""
    store.pull("runs", RUN_FILES)
    states = [json.loads(path.read_text()) for path in (store.home / "runs").glob("*/run.json")]
    return sorted(states, key=lambda state: str(state.get("started")))


def read_run(store: Store, name: str) -> dict[str, Any]:
    """run.json of one run.

    Raises:
        InputError: there is none of that name.
    """
    store.pull(f"runs/{name}", RUN_FILES)
    path = run_folder(store, name) / "run.json"
    if not path.is_file():
        known = ", ".join(str(state["name"]) for state in list_runs(store)) or "none yet"
        raise InputError(f"no run {name!r}", where=f"{store.url}/runs", mend=f"runs here: {known}")
    return dict(json.loads(path.read_text()))


def read_record(store: Store, name: str) -> RunRecord:
    """A finished run as the report reads it.

    Raises:
        InputError: no such run, or it has not been finished.
    """
    state = read_run(store, name)
    if state["status"] != "completed":
        raise InputError(f"the run is {state['status']}", where=name, mend="finish it first: run its command again")
    config = tomllib.loads((run_folder(store, name) / "config.toml").read_text())
    fields = {field: state[field] for field in RunRecord.model_fields if field in state}
    return _brought(store, RunRecord.model_validate({**fields, "config": config}))


def _brought(store: Store, record: RunRecord) -> RunRecord:
    """The record with the places that its artifacts have on this machine."""

    def here(item: RunRecord | StageRecord | SrRecord) -> dict[str, Path]:
        return {name: store.bring(value) for name, value in item if isinstance(value, Path)}

    stages = tuple(item.model_copy(update=here(item)) for item in record.stages)
    networks = tuple(item.model_copy(update=here(item)) for item in record.sr)
    return record.model_copy(update={**here(record), "stages": stages, "sr": networks})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
