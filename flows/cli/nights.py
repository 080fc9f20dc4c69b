"""Commands on nightly distillation: nightly, versions, rollback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from flows.cli.options import Group, device_option, home_option, json_option, parallel_options
from flows.cli.running import home_of, run_night


@click.group(cls=Group)
def nights() -> None:
    """Commands on nightly distillation."""


@nights.command()
@click.option("--images", required=True, help="folder of photos, Parquet with an image column, or a glob pattern")
@click.option("--test", required=True, help="photos that SR networks trained on the old and the new set are measured on")
@click.option("--preset", default="demo", show_default=True, help="demo, released, paper or best")
@click.option("--name", default="nightly", show_default=True, help="of the series, HOME/nightly/NAME")
@click.option("--metric", type=click.Choice(["psnr_y", "psnr_rgb", "ssim_y", "ssim_rgb", "lpips"]), default="psnr_y",
              show_default=True, help="what both sets are compared by")  # fmt: skip
@click.option("--margin", type=click.FloatRange(0), default=0.0, show_default=True,
              help="how much worse the new set may be, in the metric's unit")  # fmt: skip
@click.option("--cold", is_flag=True, help="always fine-tune from the base, never from the last adapter")
@click.option("--warm-steps", type=click.IntRange(0), default=None, help="steps of a fine-tuning from the last adapter")
@click.option("--config", "file", type=click.Path(path_type=Path), help="TOML file laid over the preset")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="one field; may be repeated")
@click.option("--no-prefect", is_flag=True, help="run the stages directly: same keys, same bytes")
@parallel_options
@home_option
@device_option
@json_option
def nightly(images: str, test: str, cold: bool, **options: Any) -> None:
    """Distil again if photos or settings have changed; keep the new set only if it is not worse.

    The current set is HOME/nightly/NAME/current. On a schedule: the deployment `nightly`.

    Example: ddsr nightly --images photos/ --test B100/
    """
    run_night(images=Path(images), test=Path(test), warm=not cold, **options)


@nights.command()
@click.option("--name", default="nightly", show_default=True, help="of the series")
@home_option
@json_option
def versions(name: str, home: str | None, as_json: bool) -> None:
    """List what `ddsr nightly` has made; the one in use is marked.

    Example: ddsr versions
    """
    from ddsr_core.nightly.registry import read_registry
    from ddsr_core.storage.remote_store import open_store

    registry = read_registry(open_store(home_of(home)), name)
    if as_json:
        click.echo(registry.model_dump_json(indent=2))
        return
    for item in registry.versions:
        mark = "*" if item.number == registry.champion else " "
        verdict = "promoted" if item.promoted else "not promoted"
        click.echo(f"{mark} {item.number:>4}  {item.made}  {item.metric} {item.score:.4f}  {verdict}: {item.reason}")
    for reign in registry.reigns if any(reign.why != "promoted" for reign in registry.reigns) else ():
        click.echo(f"  in use since {reign.since}: version {reign.version}, {reign.why}")
    if not registry.versions:
        click.echo(f"no versions of {name!r} in {home_of(home)}; start with: ddsr nightly")


@nights.command()
@click.argument("to", type=int, required=False)
@click.option("--name", default="nightly", show_default=True, help="of the series")
@home_option
def rollback(to: int | None, name: str, home: str | None) -> None:
    """Put an earlier distilled set in use again: version TO, or the champion before this one.

    Example: ddsr rollback
    """
    from ddsr_core.nightly.night import roll_back
    from ddsr_core.storage.remote_store import open_store

    registry = roll_back(open_store(home_of(home)), name, to)
    click.echo(f"in use: version {registry.champion}")
