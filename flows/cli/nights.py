"""Commands on nightly distillation: nightly, versions, rollback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ddsr_core.metrics.spec import METRICS
from ddsr_core.nightly.registry import Version, read_registry
from ddsr_core.pipeline.home import home_of
from ddsr_core.storage.remote_store import open_store
from flows.cli.options import (
    Group,
    chained,
    config_options,
    home_option,
    images_option,
    json_option,
    option_test,
    preset_option,
    where_options,
)
from flows.cli.running import run_night

series_option = click.option(
    "--name", default="nightly", show_default=True, help="Name of the series, its folder below HOME/nightly."
)


@click.group(cls=Group, title="Nightly distillation")
def nights() -> None:
    """Commands on nightly distillation."""


@nights.command()
@images_option
@option_test(required=True, text="Test photos on which SR networks trained on the old and the new set are compared.")
@preset_option("demo")
@config_options
@series_option
@click.option("--metric", type=click.Choice(list(METRICS)), default="psnr_y", show_default=True,
              help="Metric by which the old and the new set are compared.")  # fmt: skip
@click.option("--margin", type=click.FloatRange(0), default=0.0, show_default=True,
              help="How much worse the new set may be, in the unit of the metric. Raise it to the spread between seeds if "
                   "noise keeps new sets from being promoted.")  # fmt: skip
@click.option("--cold", is_flag=True, help="Always fine-tune from the base model, never from the last adapter.")
@click.option("--warm-steps", type=click.IntRange(0), default=None, metavar="N",
              help="Optimizer steps when fine-tuning continues from the last adapter. Lower it if few photos change per "
                   "night.  [default: as many as from the base model]")  # fmt: skip
@chained(where_options)
def nightly(images: str, test: str, cold: bool, **options: Any) -> None:
    """Distill again if photos or settings have changed.

    The new set replaces HOME/nightly/NAME/current only if SR networks trained on it are not worse than those trained on the
    active one. For a schedule, use the deployment `nightly` of a Prefect server, or cron.

    Example: ddsr nightly --images photos/ --test B100/
    """
    run_night(images=Path(images), test=Path(test), warm=not cold, **options)


@nights.command()
@series_option
@home_option
@json_option
def versions(name: str, home: str | None, as_json: bool) -> None:
    """List the versions that `ddsr nightly` has created.

    The active version is marked with an asterisk.

    Example: ddsr versions
    """
    registry = read_registry(open_store(home_of(home)), name)
    if as_json:
        click.echo(registry.model_dump_json(indent=2))
        return
    if not registry.versions:
        click.echo(f"{home_of(home)} has no versions of {name!r}. Make the first one with `ddsr nightly`.")
    for version in registry.versions:
        click.echo(f"{'*' if version.number == registry.active else ' '} {_line(version)}")
    if any(period.why != "promoted" for period in registry.active_periods):
        for period in registry.active_periods:
            click.echo(f"  version {period.version} active since {period.since}: {period.why}")


def _line(version: Version) -> str:
    verdict = "promoted" if version.promoted else "not promoted"
    return f"{version.number:>4}  {version.made}  {version.metric} {version.score:.4f}  {verdict}: {version.reason}"


@nights.command()
@click.argument("to", type=int, required=False)
@series_option
@home_option
@json_option
def rollback(to: int | None, name: str, home: str | None, as_json: bool) -> None:
    """Reactivate an earlier version of a nightly set.

    TO is the number of that version. Without it, the version that was active before the current one is restored.

    Example: ddsr rollback
    """
    from ddsr_core.nightly.night import roll_back  # imports torch

    registry = roll_back(open_store(home_of(home)), name, to)
    click.echo(json.dumps({"active": registry.active}) if as_json else f"Active version: {registry.active}")
