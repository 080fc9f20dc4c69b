"""What the commands of `ddsr` share: the group with its exit codes, and options that several have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ddsr_core.errors import DdsrError

F = TypeVar("F", bound=Callable[..., Any])


class Group(click.Group):
    """Commands in the order they are written; a `DdsrError` becomes one message and exit code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DdsrError as error:
            click.echo(f"ddsr: {error}", err=True)
            ctx.exit(1)
        except BrokenPipeError:
            ctx.exit(1)


def home_option(function: F) -> F:
    text = "where artifacts and runs are kept: a folder or s3://bucket/prefix (default: $DDSR_HOME, else ./ddsr-home)"
    return click.option("--home", default=None, help=text)(function)


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="print JSON on standard output")(function)


def device_option(function: F) -> F:
    return click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 …")(function)


def parallel_options(function: F) -> F:
    """Where the work of a run is done, for commands that run the pipeline."""
    for option in (
        click.option("--gpu", type=click.Choice(["local", "pool"]), default="local", show_default=True,
                     help="Where GPU stages run: on this machine, or on the GPU work pool."),
        click.option("--runner", type=click.Choice(["sequential", "threads", "processes", "ray"]), default=None,
                     help="Where photos are scored, patches embedded and networks trained. "
                          "[default: processes with several workers, else sequential]"),
        click.option("--workers", type=click.IntRange(1), default=1, show_default=True,
                     help="How many of them at once. Raise it if cores or GPUs stand idle."),
    ):  # fmt: skip
        function = option(function)
    return function


def run_options(function: F) -> F:
    """The options of commands that run the pipeline."""
    for option in (
        click.option("--config", "file", type=click.Path(path_type=Path), help="TOML file laid over the preset"),
        click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="one field; may be repeated"),
        click.option("--run", "name", default=None, help="name below HOME/runs (default: the preset's or experiment's)"),
        click.option("--no-prefect", is_flag=True, help="run the stages directly: same keys, same bytes"),
        home_option, device_option, json_option,
    ):  # fmt: skip
        function = option(function)
    return function
