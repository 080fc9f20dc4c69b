"""The command ``ddsr``. Exit codes: 0 done, 1 failed (what, where, how to fix), 2 wrong usage, 3 some files skipped."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from datetime import timedelta
from inspect import cleandoc
from pathlib import Path
from typing import Any, get_args

import click

from ddsr_core import __version__
from ddsr_core.errors import StorageError
from ddsr_core.experiments.names import DEFAULT_PRESET, EXPERIMENTS, PROTOCOLS, ExperimentName
from ddsr_core.imaging.demo_photos import write_demo_photos
from ddsr_core.pipeline.home import home_of
from ddsr_core.reporters import ReporterName
from ddsr_core.storage.files import storage_errors
from ddsr_core.storage.remote_store import open_store
from flows.cli.doctor import examine
from flows.cli.networks import networks, steps
from flows.cli.nights import nights
from flows.cli.options import (
    Group,
    chained,
    config_options,
    home_option,
    images_option,
    json_option,
    lines,
    option_test,
    preset_option,
    run_option,
    run_options,
    set_option,
    where_options,
)
from flows.cli.plan import planning
from flows.cli.running import run_experiment, run_pipeline
from flows.cli.runs import finished
from flows.cli.settings import settings_group


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ddsr")
def cli() -> None:
    """Dataset distillation for super-resolution: from a folder of photos to a small training set.

    \b
    Start with:  ddsr demo
    Then:        ddsr distill --images photos/ --preset demo
    """


@click.group(cls=Group, title="Distillation")
def distillation() -> None:
    """Commands that run the pipeline."""


@distillation.command()
@run_options
def demo(**options: Any) -> None:
    """Run the whole pipeline on bundled photos, in minutes.

    Example: ddsr demo --home /tmp/ddsr
    """
    home = open_store(home_of(options["home"])).home
    with storage_errors(home):
        images, test = write_demo_photos(home / "demo-photos")
    options["name"] = options["name"] or "demo"
    run_pipeline(images=images, test=test, preset="demo", **options)


dry_run_option = click.option("--dry-run", "dry", is_flag=True, help="Check photos, settings, device and disk, then exit.")


@distillation.command()
@images_option
@option_test(required=False)
@preset_option("demo")
@chained([config_options, run_option("the preset"), dry_run_option, *where_options])
def distill(images: str, test: str | None, preset: str, **options: Any) -> None:
    """Distill a folder of photos and evaluate the result.

    Trains SR networks on the distilled set and on other training sets, and measures them on the test photos. The set and a
    report are written to the folder of the run, HOME/runs/NAME.

    Example: ddsr distill --images photos/ --preset demo --set sample.count=140
    """
    run_pipeline(images=Path(images), test=None if test is None else Path(test), preset=preset, **options)


REPRODUCE = lines(
    cleandoc("""Reproduce the paper's tables, or ablate the method.

    Within a column of a table, all training sets have the same number of images, and all networks are trained for the same
    number of iterations. To resume an interrupted run, repeat the command.

    Example: ddsr reproduce table2 --images photos/ --test B100/ --protocol mini --seeds 3"""),
    EXPERIMENTS,
)


@distillation.command(help=REPRODUCE)
@click.argument("experiment", type=click.Choice(list(EXPERIMENTS)), metavar="EXPERIMENT")
@images_option
@option_test(required=True)
@click.option("--protocol", "--scale", "protocol", type=click.Choice(list(PROTOCOLS)), default="mini",
              help=lines("Size of the networks and number of images.  [default: mini]", PROTOCOLS))  # fmt: skip
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True,
              help="Number of seeds, counted from 0. Conclusions need at least three.")  # fmt: skip
@preset_option(None, f"Settings that the protocol is applied to; by default {' or '.join(DEFAULT_PRESET.values())}.")
@chained([config_options, run_option("the experiment"), *where_options])
def reproduce(experiment: ExperimentName, images: str, test: str, **options: Any) -> None:
    """The help text is `REPRODUCE`."""
    command = as_typed(click.get_current_context())
    run_experiment(experiment=experiment, images=Path(images), test=Path(test), command=command, **options)


def as_typed(context: click.Context) -> str:
    """The command with every argument and option that has a value, defaults included, ready to be run again."""
    words = ["ddsr", str(context.info_name)]
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(parameter, click.Argument):
                words.append(str(item))
            elif item is True:
                words.append(parameter.opts[0])
            elif item not in (None, False):
                words += [parameter.opts[0], str(item)]
    return shlex.join(words)


@click.group(cls=Group, title="Set-up")
def setup() -> None:
    """Commands on this machine and on the Prefect server."""


@setup.command()
@home_option
@json_option
def doctor(home: str | None, as_json: bool) -> None:
    """Check packages, weights, device, disk and Prefect.

    Example: ddsr doctor
    """
    checks = examine(home_of(home))
    if as_json:
        click.echo(json.dumps([vars(check) for check in checks], indent=2))
    else:
        for check in checks:
            click.echo(f"{check.verdict:<5} {check.subject}: {check.finding}")
            if check.fix:
                click.echo(f"      fix: {check.fix}")
    if any(check.verdict == "FAIL" for check in checks):
        sys.exit(1)


@setup.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder for the base model.")
@click.option("--photos", type=click.Path(path_type=Path), metavar="DIR",
              help="Photos to train on.  [default: photographs from Debian packages, downloaded]")  # fmt: skip
@set_option("prior_steps=100", "Change one field of the recipe; may be repeated.")
@click.option("--report-to", type=click.Choice(get_args(ReporterName)), default=None,
              help="Program that shows the training curves. Its files go to OUT/tracking.")  # fmt: skip
@json_option
def pretrain(photos: Path | None, out: Path, overrides: tuple[str, ...], report_to: Any, as_json: bool) -> None:
    """Train a small base model, such as ddsr-tiny, on photos.

    Example: ddsr pretrain --out my-base --photos photos/
    """
    folder = steps().pretrain_base(photos, out, overrides, report_to)
    click.echo(json.dumps({"base": str(folder)}) if as_json else f"Base model: {folder}")


@setup.command()
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True,
              help="Number of GPUs over all machines: at most this many GPU jobs run at once.")  # fmt: skip
@click.option("--type", "pool_type", type=click.Choice(["process", "docker", "kubernetes"]), default="process",
              show_default=True, help="Type of the work pools that are created. Existing pools keep theirs.")  # fmt: skip
@click.option("--silence", type=click.IntRange(35), default=120, show_default=True, metavar="SECONDS",
              help="Seconds without a heartbeat after which a run counts as crashed. Heartbeats come every 30 s. Raise it "
                   "if runs on busy machines are marked as crashed.")  # fmt: skip
@json_option
def deploy(gpus: int, pool_type: Any, silence: int, as_json: bool) -> None:
    """Set up work pools and deployments on the Prefect server.

    Also sets up concurrency limits and automations. Set PREFECT_API_URL to the address of the server. Running the command
    again changes only what differs.

    Example: ddsr deploy --gpus 2
    """
    from deployments.deploy import deploy as bring_up  # imports Prefect

    changes = list(bring_up(gpus, pool_type, timedelta(seconds=silence)))
    if as_json:
        click.echo(json.dumps([{"what": what, "verdict": verdict} for what, verdict in changes], indent=2))
        return
    for what, verdict in changes:
        click.echo(f"{verdict:<10} {what}")
    click.echo("Start a worker for CPU work: prefect worker start --pool cpu --type process")
    click.echo("and one per GPU: CUDA_VISIBLE_DEVICES=0 prefect worker start --pool cuda --type process --limit 1")


@setup.command()
@click.argument("target", metavar="URL|ADDRESS")
@click.option(
    "--name", default="ddsr", show_default=True, help="Name of this target. An existing target of the same name is replaced."
)
@click.option("--sender", default=None, metavar="ADDRESS", help="Sender of e-mail; requires SENDGRID_API_KEY.")
@json_option
def notify(target: str, name: str, sender: str | None, as_json: bool) -> None:
    """Send a message when a run fails or a set is promoted.

    The target is the URL of a Slack webhook or any other webhook, or an e-mail address. Crashed runs are reported, too.

    Example: ddsr notify https://hooks.slack.com/services/…
    """
    from deployments.notifications import notify as set_up  # imports Prefect

    changes = list(set_up(target, name, sender, os.environ.get("SENDGRID_API_KEY")))
    if as_json:
        click.echo(json.dumps([{"what": what, "verdict": verdict} for what, verdict in changes], indent=2))
        return
    for what, verdict in changes:
        click.echo(f"{verdict:<10} {what}")


for group in (distillation, planning, networks, nights, finished, settings_group, setup):
    cli.add_section(group)


def main() -> None:
    """Entry point of the command ``ddsr``."""
    os.environ.setdefault("LANCE_LOG", "error")  # LanceDB warns about every new table
    logging.getLogger("ddsr").addHandler(logging.StreamHandler())  # shows which run a stage waits for
    try:
        cli()
    except KeyboardInterrupt:
        click.echo("ddsr: stopped", err=True)
        sys.exit(130)
    except OSError as error:
        raise SystemExit(f"ddsr: {StorageError(str(error.strerror), where=error.filename)}") from error


if __name__ == "__main__":
    main()
