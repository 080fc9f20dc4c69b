"""The command ``ddsr``. Exit codes: 0 done, 1 failed (what, where, how to fix), 2 wrong usage."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from ddsr_core import __version__
from ddsr_core.errors import StorageError
from flows.cli.networks import networks
from flows.cli.nights import nights
from flows.cli.options import Group, home_option, json_option, parallel_options, run_options
from flows.cli.running import home_of, run_experiment, run_pipeline
from flows.cli.runs import finished


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ddsr")
def cli() -> None:
    """Dataset distillation for super-resolution: a folder of photos in, a tiny training set out.

    \b
    Start with:  ddsr demo
    Then:        ddsr distill --images photos/ --preset demo
    """


@cli.command()
@run_options
def demo(**options: Any) -> None:
    """The whole pipeline on bundled photos, in minutes.

    Example: ddsr demo --home /tmp/ddsr
    """
    from ddsr_core.imaging.demo_photos import write_demo_photos
    from ddsr_core.storage.files import storage_errors
    from ddsr_core.storage.remote_store import open_store

    home = open_store(home_of(options["home"])).home
    with storage_errors(home):
        images, test = write_demo_photos(home / "demo-photos")
    run_pipeline(images=images, test=test, preset="demo", runner=None, workers=1, **options)


@cli.command()
@click.option("--images", required=True, help="folder of photos, Parquet with an image column, or a glob pattern")
@click.option("--test", default=None, help="test photos; without it one photo in ten is held out")
@click.option("--preset", default="demo", show_default=True, help="demo, released, paper or best")
@parallel_options
@run_options
def distill(images: str, test: str | None, preset: str, **options: Any) -> None:
    """Distill a folder of photos, train SR networks on the result and compare.

    Example: ddsr distill --images photos/ --preset demo --set sample.count=140
    """
    run_pipeline(images=Path(images), test=None if test is None else Path(test), preset=preset, **options)


@cli.command()
@click.argument(
    "experiment", type=click.Choice(["ablation", "table1", "table2", "table3", "sources", "starts", "shares", "budget"])
)
@click.option("--images", required=True, help="folder of photos, Parquet with an image column, or a glob pattern")
@click.option("--test", required=True, help="test photos")
@click.option("--preset", default=None, help="demo, released, paper or best; without it demo for mini, best for paper")
@click.option("--scale", type=click.Choice(["mini", "paper"]), default="mini", show_default=True,
              help="mini: small networks and few images, for two cores; paper: the paper's")  # fmt: skip
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="how many seeds, from 0")
@parallel_options
@run_options
def reproduce(experiment: Any, images: str, test: str, **options: Any) -> None:
    """Fill the paper's tables, or measure what each part of the method is worth.

    Every training set of a column has as many images, every network as many iterations.

    Example: ddsr reproduce table2 --images photos/ --test B100/ --scale mini --seeds 3
    """
    command = as_typed(click.get_current_context())
    run_experiment(experiment=experiment, images=Path(images), test=Path(test), command=command, **options)


def as_typed(context: click.Context) -> str:
    """The command with every argument and option it has a value for, defaults included: it can be run again."""
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


@cli.command()
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True, help="GPU jobs at once, over all machines")
@click.option("--type", "pool_type", type=click.Choice(["process", "docker", "kubernetes"]), default="process",
              show_default=True, help="of the work pools, where they are not there yet")  # fmt: skip
@click.option("--silence", type=click.IntRange(35), default=120, show_default=True,
              help="seconds without a heartbeat (there is one every 30), after which a run has crashed")  # fmt: skip
def deploy(gpus: int, pool_type: Any, silence: int) -> None:
    """Make work pools, limits, automations and deployments on the Prefect server; run again, it changes nothing.

    PREFECT_API_URL names the server.

    Example: ddsr deploy --gpus 2
    """
    from datetime import timedelta

    from deployments.deploy import deploy as bring_up

    for what, verdict in bring_up(gpus, pool_type, timedelta(seconds=silence)):
        click.echo(f"{verdict:<10} {what}")
    click.echo("Workers: prefect worker start --pool cpu --type process; one for each GPU: "
               "CUDA_VISIBLE_DEVICES=0 prefect worker start --pool cuda --type process --limit 1")  # fmt: skip


@cli.command()
@home_option
@json_option
def doctor(home: str | None, as_json: bool) -> None:
    """Check this machine: packages, weights, device, disk, Prefect.

    Example: ddsr doctor
    """
    from flows.cli.housekeeping import examine

    checks = examine(home_of(home))
    if as_json:
        click.echo(json.dumps([check.__dict__ for check in checks], indent=2))
    else:
        for check in checks:
            click.echo(f"{check.verdict:<5} {check.subject}: {check.finding}")
            if check.fix:
                click.echo(f"      fix: {check.fix}")
    if any(check.verdict == "FAIL" for check in checks):
        sys.exit(1)


@cli.command()
@click.option("--photos", type=click.Path(path_type=Path), default=None, help="photographs (default: from Debian packages)")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="folder for the base model")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="a field of the recipe, e.g. prior_steps=100")
def pretrain(photos: Path | None, out: Path, overrides: tuple[str, ...]) -> None:
    """Train a base model like ddsr-tiny from a folder of photographs.

    Example: ddsr pretrain --out my-base --photos photos/
    """
    from flows.cli.single_steps import pretrain_base

    click.echo(f"Base model: {pretrain_base(photos, out, overrides)}")


for group in (networks, nights, finished):
    for command in group.commands.values():
        cli.add_command(command)


def main() -> None:
    """Entry point of the command ``ddsr``."""
    os.environ.setdefault("LANCE_LOG", "error")  # LanceDB warns of every table that is new
    logging.getLogger("ddsr").addHandler(logging.StreamHandler())  # for whom a stage waits: Prefect's console is silenced
    try:
        cli()
    except KeyboardInterrupt:
        click.echo("ddsr: stopped", err=True)
        sys.exit(130)
    except OSError as error:
        raise SystemExit(f"ddsr: {StorageError(str(error.strerror), where=error.filename)}") from error


if __name__ == "__main__":
    main()
