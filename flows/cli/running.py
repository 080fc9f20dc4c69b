"""Runs as the command line starts them: the request, with or without Prefect, and what is printed at the end."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import click

from ddsr_core.pipeline.config import checked, load_config
from ddsr_core.pipeline.home import home_of
from ddsr_core.pipeline.request import RunRequest
from ddsr_core.pipeline.run_folder import run_folder
from ddsr_core.storage.remote_store import open_store
from flows.cli.prefect_settings import apply_defaults
from flows.cli.temporary_server import begin_server

R = TypeVar("R", bound=RunRequest)


def library() -> Any:
    """The functions that runs need. Importing them takes seconds; `ddsr --help` must not wait for it."""
    from flows.cli import library

    return library


def request_of(kind: type[R], *, file: Path | None, home: str | None, runner: str | None, workers: int, **fields: Any) -> R:
    """The request that the options of a command make.

    Args:
        file: a TOML or YAML file whose values override the preset.
        runner: None for processes where there are several workers.
        fields: of the request.

    Raises:
        ConfigError: the file cannot be read, or has an unknown field or a value out of range.
    """
    runner = runner or ("processes" if workers > 1 else "sequential")
    request = checked(kind, {"home": home_of(home), "runner": runner, "workers": workers, **fields})
    if file is None:
        return request
    config = load_config(request.base_preset, file, protocol=getattr(request, "protocol", None))
    return request.model_copy(update={"config": config, "preset": config.preset})


def dry_run(request: RunRequest) -> None:
    """Print what a run would use, an estimate, and notices about it."""
    store = open_store(request.home)
    found = library().preflight(request, store)
    for line in found.lines:
        click.echo(line)
    click.echo(f"estimate: {library().estimate_text(request, store.home)}")
    for notice in found.notices:
        click.echo(f"notice: {notice}")
    click.echo(f"Nothing was run. Time, memory and disk of each stage: ddsr plan --images {request.images} "
               f"--preset {request.base_preset}")  # fmt: skip


def require_ready(request: RunRequest) -> None:
    """Check a request before Prefect is started for it.

    Raises:
        DdsrError: wrong photos, config, name or device, or a home that cannot be written.
    """
    library().check_request(request, open_store(request.home))


@contextmanager
def stopping() -> Iterator[None]:
    """Ctrl-C ends the command with 130 and says how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("ddsr: stopped. Run the same command again to continue.", err=True)
        sys.exit(130)


def call_flow(entry: str, name: str, request: RunRequest) -> Any:
    """Import the flow ``module:name`` after Prefect's defaults are set, and run it in this process.

    Args:
        name: of the flow run.
        request: its fields are the flow's parameters.

    Raises:
        DdsrError: Prefect's temporary server did not start, or the user's server does not answer.
    """
    folder = open_store(request.home).home
    apply_defaults(folder)
    server = begin_server(folder)
    from tasks import progress as shown  # after the defaults are set, as it imports Prefect
    from tasks.server import require_server

    shown.current.set(library().progress_for())
    module, _, function = entry.partition(":")
    flow = getattr(importlib.import_module(module), function)
    if server is not None:
        server.wait()
    else:
        require_server()
    fields = {name: value for name, value in request if name in signature(flow.fn).parameters}
    return flow.with_options(flow_run_name=name)(**fields)


def run_pipeline(*, name: str | None, no_prefect: bool, as_json: bool, dry: bool = False, **options: Any) -> None:
    """Distill with or without Prefect; prints the table and where the report is."""
    request = request_of(RunRequest, run=name, **options)
    if dry:
        dry_run(request)
        return
    with stopping():
        require_ready(request)
        if no_prefect:
            estimate = library().estimate_text(request, open_store(request.home).home)
            click.echo(f"ddsr: estimate: {estimate}", err=True)
            outcome = library().run_plainly(request, library().progress_for())
        else:
            outcome = call_flow("flows.distill:distill", request.run_name, request)
    if as_json:
        fields = ("run", "folder", "report", "stages", "skipped")
        data = {**{name: getattr(outcome, name) for name in fields}, "results": outcome.table}
        click.echo(json.dumps(data, indent=2, default=str))
        return
    library().print_results(outcome.table, title=f"SR networks on the test photos (x{request.resolved_config().scale})")
    for reason, count in outcome.skipped.items():
        click.echo(f"Skipped: {count} photos: {reason}")
    cached = sum(row["cached"] for row in outcome.stages)
    click.echo(f"{len(outcome.stages)} stages, {cached} from cache. Distilled set: {outcome.folder / 'distilled'}")
    click.echo(f"Report: {outcome.report}")


def run_night(*, no_prefect: bool, as_json: bool, **options: Any) -> None:
    """A night with or without Prefect; prints what has changed, before and after.

    If nothing has changed, Prefect's temporary server is not started: that would take longer than the night itself.
    """
    request = request_of(library().NightRequest, **options)
    with stopping():
        require_ready(request)
        if no_prefect:
            data = library().run_night_plainly(request, library().progress_for())
        else:
            unchanged = None if os.environ.get("PREFECT_API_URL") else library().unchanged_night(request)
            data = unchanged or call_flow("flows.nightly:nightly", request.name, request)
    text = data.pop("text")
    click.echo(json.dumps(data, indent=2) if as_json else text)


def run_experiment(*, name: str | None, no_prefect: bool, as_json: bool, **options: Any) -> None:
    """An experiment with or without Prefect; prints its table and the path of the table."""
    request = request_of(library().ExperimentRequest, run=name, **options)
    with stopping():
        require_ready(request)
        if no_prefect:
            measured = library().run_experiment_plainly(request, library().progress_for())
        else:
            measured = call_flow("flows.reproduce:reproduce", request.run_name, request)
    folder = run_folder(open_store(request.home), measured["run"])
    if as_json:
        click.echo(json.dumps(measured, indent=2))
        return
    click.echo((folder / f"{request.experiment}.md").read_text())
    click.echo(f"Tables: {folder / request.experiment}.md, .csv and .json, and contact sheets")
    click.echo(f"Page: {folder / 'report.html'}")
