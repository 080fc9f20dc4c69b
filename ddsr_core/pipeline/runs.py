"""The run folder: ``<home>/runs/<name>/`` with run.json, config.toml, distilled/, report.html, report.json, tables/."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ddsr_core.errors import ConfigError, InputError, StorageError
from ddsr_core.pipeline.config import PipelineConfig, to_toml
from ddsr_core.pipeline.stages import Chain, StageRun
from ddsr_core.report.record import RunRecord, SrRecord, StageRecord
from ddsr_core.storage.store import LOG, Artifact, Store, storage_errors, write_atomically, write_json

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


def check_run_name(name: str) -> None:
    """
    Raises:
        ConfigError: it cannot be the name of a folder below ``<home>/runs``.
    """
    if not name or name in (".", "..") or any(sign in "/\\[]*?" or not sign.isprintable() for sign in name):
        raise ConfigError(f"{name!r} cannot be the name of a run", where="run", fix="use letters, digits, - and _")


def start_run(store: Store, name: str, config: PipelineConfig, images: Path, test: Path | None) -> Path:
    """Make the run folder and say in it that the run has begun. What an earlier run of that name has made is kept for it.

    Raises:
        ConfigError: as `check_run_name`.
        StorageError: the home cannot be written.
    """
    check_run_name(name)
    folder = run_folder(store, name)
    before = _published_state(store, name) or {}
    earlier = {stage["key"] for stage in before.get("stages", [])} | set(before.get("kept", []))
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.toml", to_toml(config).encode())
        state = {"name": name, "preset": config.preset, "status": "running", "images": str(images), "test": str(test)}
        write_json(folder / "run.json", {**state, "started": _now(), "kept": sorted(earlier)})
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
    from ddsr_core.report.html import write_report

    folder = run_folder(store, name)
    record = to_record(name, config, chain)
    with storage_errors(folder):
        distilled = chain.named("sample")
        if distilled is not None:
            publish_distilled(distilled, folder / "distilled")
        started = json.loads((folder / "run.json").read_text())
        facts = record.model_dump(mode="json", exclude={"config"})
        write_json(folder / "run.json", {**_over(started), **facts, "status": "completed", "finished": _now()})
        report = write_report(folder, record)
    store.push(f"runs/{name}", mirror=True)
    return Outcome(folder, report, results_table(chain), stage_rows(chain))


def complete_run(store: Store, name: str, stages: Iterable[StageRun]) -> None:
    """Note in run.json that a run which has no report is finished, and its stages; one that was used several times once."""
    records = {item.artifact.key: _stage_record(item).model_dump(mode="json") for item in stages}
    path = run_folder(store, name) / "run.json"
    with storage_errors(path):
        state = _over(json.loads(path.read_text()))
        write_json(path, {**state, "status": "completed", "finished": _now(), "stages": list(records.values())})
    store.push(f"runs/{name}", mirror=True)


def _over(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != "kept"}


@contextmanager
def failure_noted(store: Store, name: str) -> Iterator[None]:
    """Note in run.json why a run that goes on has stopped, whatever stopped it; the exception passes."""
    try:
        yield
    except KeyboardInterrupt:
        fail_run(store, name, "stopped by the user")
        raise
    except BaseException as error:  # SIGTERM of a cancelled run, memory that is used up …
        fail_run(store, name, str(error) or type(error).__name__)
        raise


def fail_run(store: Store, name: str, message: str) -> None:
    """Note in run.json why the run has stopped. One that was finished before it could begin again stays so."""
    path = run_folder(store, name) / "run.json"
    try:
        state = json.loads(path.read_text()) if path.exists() else {}
        if state.get("status") != "running":
            return
        run_log(store, name)(f"failed: {message}")
        write_json(path, {**state, "status": "failed", "message": message, "finished": _now()})
        store.push(f"runs/{name}")
    except (StorageError, OSError) as error:  # most likely what the run has failed of
        LOG.warning("%s: that the run has failed is not noted: %s", path, error)


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
    paths = (path.split("/") for path in store.sizes("runs"))
    names = sorted(path[0] for path in paths if path[1:] == ["run.json"])
    states = [state for name in names if (state := _published_state(store, name)) is not None]
    return sorted(states, key=lambda state: str(state.get("started")))


def read_run(store: Store, name: str) -> dict[str, Any]:
    """run.json of one run.

    Raises:
        InputError: there is none of that name.
    """
    state = _published_state(store, name)
    if state is None:
        known = ", ".join(str(state["name"]) for state in list_runs(store)) or "none yet"
        raise InputError(f"no run {name!r}", where=f"{store.url}/runs", fix=f"runs here: {known}")
    return state


def _published_state(store: Store, name: str) -> dict[str, Any] | None:
    """run.json as all machines see it: a run that goes on here has newer files in its folder than it has published."""
    data = store.read_file(f"runs/{name}/run.json")
    return None if data is None else dict(json.loads(data))


def read_record(store: Store, name: str) -> RunRecord:
    """A finished run as the report reads it; its run.json and config.toml are brought to this machine.

    Raises:
        InputError: no such run, or it has not been finished.
    """
    state = read_run(store, name)
    if state["status"] != "completed":
        raise InputError(f"the run is {state['status']}", where=name, fix="finish it first: run its command again")
    store.pull(f"runs/{name}", RUN_FILES)
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
