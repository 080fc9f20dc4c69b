"""Commands that plan a run before it begins, and measure the machine that plans are made for."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ddsr_core.config import resolve_device
from ddsr_core.pipeline.config import load_config
from ddsr_core.pipeline.home import home_of
from ddsr_core.storage.remote_store import open_store
from flows.cli.options import (
    Group,
    config_options,
    device_option,
    home_option,
    json_option,
    option_test,
    preset_option,
)


@click.group(cls=Group, title="Planning")
def planning() -> None:
    """Commands that estimate what a run costs."""


@planning.command()
@click.option("--images", default=None, metavar="PATH", help="Training photos. Only their sizes are read.")
@click.option("--sizes", default=None, metavar="SIZES",
              help="Number and size of photos that are not on this machine, such as 10000@1280x960.")  # fmt: skip
@option_test(required=False)
@preset_option("demo")
@config_options
@click.option("--gpu", default=None, metavar="NAME|FILE",
              help="Machine to plan for: rtx3090, rtx4090, a100, h100, h200, cpu, or a file that `ddsr bench` has written.  "
                   "[default: this machine]")  # fmt: skip
@click.option("--price", type=click.FloatRange(0), default=None, metavar="PRICE",
              help="Price of that machine per hour, in any currency. Without it, no cost is shown.")  # fmt: skip
@click.option("--accepted", type=click.FloatRange(0, 1, min_open=True), default=0.5, show_default=True,
              help="Share of the windows that patches.threshold_db is assumed to accept.")  # fmt: skip
@home_option
@device_option
@json_option
def plan(
    images: str | None, sizes: str | None, test: str | None, preset: str, file: Path | None, overrides: tuple[str, ...],
    gpu: str | None, price: float | None, accepted: float, home: str | None, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Plan a run: time, memory, disk and cost.

    Needs no weights and computes no results: it reads only the sizes of photos, and counts FLOPs and memory by running the
    stages on fake tensors, which have shapes but no data. The exit code is 1 if a stage does not fit into memory.

    Example: ddsr plan --images photos/ --preset best --gpu rtx3090 --price 0.5
    """
    # Imported here, as torch takes seconds, and `ddsr --help` should not.
    from ddsr_core.planning.request import PlanRequest, plan_of, row_of, summary_of

    request = PlanRequest(
        config=load_config(preset, file, overrides), images=None if images is None else Path(images), sizes=sizes,
        test=None if test is None else Path(test), gpu=gpu, price=price, accepted=accepted,
    )  # fmt: skip
    planned = plan_of(request, open_store(home_of(home)).home, device)
    if as_json:
        click.echo(json.dumps(planned.as_json(), indent=2))
    else:
        print_rows([row_of(stage) for stage in planned.stages])
        click.echo(summary_of(planned))
    if planned.first_misfit is not None:
        click.get_current_context().exit(1)


def print_rows(rows: list[dict[str, str]]) -> None:
    """A table with columns as wide as their contents; numbers to the right."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    left = ("stage", "items", "fits")
    for row in [{name: name for name in widths}, *rows]:
        cells = (row[name].ljust(width) if name in left else row[name].rjust(width) for name, width in widths.items())
        click.echo("  ".join(cells).rstrip())


@planning.command()
@home_option
@device_option
@json_option
def bench(home: str | None, device: str, as_json: bool) -> None:
    """Measure this machine for `ddsr plan`.

    Takes about half a minute. Run it while the machine is idle. The rates are stored in the home, and later plans use
    them.

    Example: ddsr bench
    """
    # Imported here for the same reason.
    from ddsr_core.planning.bench import measure_machine, save_machine

    machine = measure_machine(resolve_device(device))
    file = save_machine(machine, open_store(home_of(home)).home)
    if as_json:
        click.echo(json.dumps(machine.model_dump(mode="json"), indent=2))
        return
    for name, value in machine.rates.model_dump().items():
        click.echo(f"{name:<16} {value:.3g}")
    for name, value in machine.host.model_dump().items():
        click.echo(f"{name:<16} {value:.3g}")
    click.echo(f"Stored in {file}")
