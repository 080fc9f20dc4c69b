"""A whole run as the command line starts it: config, run folder, chain, and what is printed at the end."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ddsr_core.experiments.names import ExperimentName
    from ddsr_core.experiments.names import ProtocolName as Scale
    from ddsr_core.metrics.spec import MetricName as Metric
    from ddsr_core.nightly.night import Outcome

DEFAULT_HOME = "ddsr-home"


def home_of(home: str | None) -> str:
    """The home, a folder or an URL on S3: the option, $DDSR_HOME, or ./ddsr-home."""
    named = home or os.environ.get("DDSR_HOME", DEFAULT_HOME)
    return named if "://" in named else str(Path(named).expanduser().absolute())


def run_pipeline(
    *,
    images: Path,
    test: Path | None,
    preset: str,
    file: Path | None,
    overrides: tuple[str, ...],
    name: str | None,
    no_prefect: bool,
    home: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Load the config, run the chain with or without Prefect, print the table and where the report is."""
    from ddsr_core.imaging.hold_out import hold_out
    from ddsr_core.pipeline.config import load_config
    from ddsr_core.pipeline.runs import check_run_name, failure_noted
    from ddsr_core.storage.remote_store import open_store
    from flows.cli.console import print_results, progress_for

    config = load_config(preset, file, overrides)
    store, run = open_store(home_of(home)), name or preset
    check_run_name(run)
    store.check()
    if config.sr.archs and test is None:
        images, test = hold_out(images, store.home)
    with stopping(), failure_noted(store, run):
        arguments = (config, images, test, store, run, device, progress_for())
        outcome = run_plainly(*arguments) if no_prefect else run_with_prefect(*arguments)
    if as_json:
        facts = {"run": run, "folder": outcome.folder, "report": outcome.report, "stages": outcome.stages}
        click.echo(json.dumps({**facts, "results": outcome.table}, indent=2, default=str))
        return
    print_results(outcome.table)
    cached = sum(row["cached"] for row in outcome.stages)
    click.echo(f"{len(outcome.stages)} stages, {cached} from cache. Distilled set: {outcome.folder / 'distilled'}")
    click.echo(f"Report: {outcome.report}")


@contextmanager
def stopping() -> Iterator[None]:
    """Ctrl-C ends the command with 130 and says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("ddsr: stopped. Run the same command again to go on where it stood.", err=True)
        sys.exit(130)


def run_plainly(config: Any, images: Path, test: Path | None, store: Any, run: str, device: str, progress: Any) -> Any:
    """The chain without Prefect."""
    from ddsr_core.pipeline.pins import Pins
    from ddsr_core.pipeline.runs import finish_run, run_log, start_run
    from ddsr_core.pipeline.stages import distill_and_train
    from flows.building import plain_builder

    start_run(store, run, config, images, test)
    pins = Pins(store, run)
    chain = distill_and_train(
        config, images, test, pins.building(plain_builder(store, device, progress, run)), run_log(store, run)
    )
    outcome = finish_run(store, run, config, chain)
    pins.drop()
    return outcome


def run_with_prefect(config: Any, images: Path, test: Path | None, store: Any, run: str, device: str, progress: Any) -> Any:
    """The flow, on the server that Prefect is set up for or on an ephemeral one."""
    arguments = {"images": images, "test": test, "config": config, "home": store.url, "run": run, "device": device}
    return call_flow("flows.distill:distill", run, store.home, progress, arguments)


def call_flow(entry: str, run: str, home: Path, progress: Any, arguments: dict[str, Any]) -> Any:
    """Import the flow ``module:name`` after Prefect's defaults are set, and run it in this process.

    Raises:
        DdsrError: Prefect's temporary server did not start.
    """
    from flows.cli.prefect_settings import apply_defaults
    from flows.cli.temporary_server import begin_server, wait_for_server

    apply_defaults(home)
    begun = begin_server()
    from tasks import progress as shown

    shown.current.set(progress)
    module, _, name = entry.partition(":")
    flow = getattr(importlib.import_module(module), name)
    if begun:
        wait_for_server()
    return flow.with_options(flow_run_name=run)(**arguments)


def run_night(
    *,
    images: Path,
    test: Path,
    preset: str,
    name: str,
    metric: Metric,
    margin: float,
    warm: bool,
    warm_steps: int | None,
    file: Path | None,
    overrides: tuple[str, ...],
    no_prefect: bool,
    home: str | None,
    device: str,
    as_json: bool,
) -> None:
    """A night with or without Prefect; prints what has changed, before and after.

    Prefect's temporary server is not started to say that nothing has changed: that would take longer than the night.
    """
    from ddsr_core.nightly.night import Night, challenge, facts_of, photo_cache_of, unchanged
    from ddsr_core.pipeline.config import load_config
    from ddsr_core.storage.remote_store import open_store
    from flows.building import plain_builder
    from flows.cli.console import progress_for

    store = open_store(home_of(home))
    night = Night(name, images, test, load_config(preset, file, overrides), metric, margin, warm, warm_steps)
    store.check()
    with stopping():
        outcome: Outcome | None
        if no_prefect:
            outcome = challenge(night, store, plain_builder(store, device, progress_for(), name, photo_cache_of(name)))
        else:
            outcome = None if os.environ.get("PREFECT_API_URL") else unchanged(night, store)
        if outcome is not None:
            facts = facts_of(outcome, name)
        else:
            arguments = {**vars(night), "home": store.url, "device": device}
            facts = call_flow("flows.nightly:nightly", name, store.home, progress_for(), arguments)
    text = facts.pop("text")
    click.echo(json.dumps(facts, indent=2) if as_json else text)


def run_experiment(
    *,
    experiment: ExperimentName,
    images: Path,
    test: Path,
    preset: str | None,
    scale: Scale,
    seeds: int,
    workers: int,
    file: Path | None,
    overrides: tuple[str, ...],
    name: str | None,
    no_prefect: bool,
    home: str | None,
    device: str,
    as_json: bool,
    command: str,
) -> None:
    """An experiment with or without Prefect; prints its table and where it lies."""
    from ddsr_core.experiments.names import DEFAULT_PRESET
    from ddsr_core.experiments.paper_tables import design_of
    from ddsr_core.experiments.run import finish, measure
    from ddsr_core.pipeline.config import load_config
    from ddsr_core.pipeline.fan_out import fan_out
    from ddsr_core.pipeline.runs import check_run_name, failure_noted, run_folder, run_log
    from ddsr_core.storage.remote_store import open_store
    from flows.building import plain_builder
    from flows.cli.console import progress_for

    config = load_config(preset or DEFAULT_PRESET[scale], file, overrides, scale=scale)
    store, run = open_store(home_of(home)), name or experiment
    check_run_name(run)
    store.check()
    with stopping(), failure_noted(store, run):
        if no_prefect:
            build = plain_builder(store, device, progress_for(), run)
            design, log = design_of(experiment, scale), run_log(store, run)
            with fan_out(workers) as ahead:
                done = measure(design, config, images, test, seeds, store, run, build, log, command, ahead, device)
            facts = finish(store, run, done)
        else:
            runner = "processes" if workers > 1 else "sequential"
            arguments = {
                "images": images, "test": test, "experiment": experiment, "scale": scale, "config": config,
                "seeds": seeds, "runner": runner, "workers": workers, "home": store.url, "run": run, "device": device,
                "command": command,
            }  # fmt: skip
            facts = call_flow("flows.reproduce:reproduce", run, store.home, progress_for(), arguments)
    folder = run_folder(store, run)
    click.echo(json.dumps(facts, indent=2) if as_json else (folder / f"{experiment}.md").read_text())
    if not as_json:
        click.echo(f"Tables: {folder / experiment}.md, .csv and .json; contact sheets beside them")
