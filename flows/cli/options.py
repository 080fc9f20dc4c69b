"""What the commands of `ddsr` share: the group with its sections and exit codes, and options that several commands have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from click.shell_completion import CompletionItem

import ddsr_core
from ddsr_core.errors import DdsrError
from ddsr_core.pipeline.home import home_of
from ddsr_core.pipeline.run_folder import parsed_state
from ddsr_core.reporters import ReporterName
from flows.cli.temporary_server import names_server

F = TypeVar("F", bound=Callable[..., Any])
#: What `click.option` returns: it decorates a command.
Option = Callable[[Any], Any]


class Group(click.Group):
    """Commands in sections, in the order they are written. A `DdsrError` becomes one message and exit code 1.

    Args:
        title: heading of its commands in ``ddsr --help``.
    """

    def __init__(self, *arguments: Any, title: str = "Commands", **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.title = title
        self.sections: list[Group] = []

    def add_section(self, section: Group) -> None:
        """Add the commands of another group, under its title."""
        self.sections.append(section)
        for command in section.commands.values():
            self.add_command(command)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = formatter.width - 6 - max(map(len, self.commands))
        for section in self.sections:
            with formatter.section(section.title):
                formatter.write_dl([(name, item.get_short_help_str(width)) for name, item in section.commands.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DdsrError as error:
            click.echo(f"ddsr: {error}", err=True)
            ctx.exit(1)
        except BrokenPipeError:
            ctx.exit(1)


def lines(text: str, choices: Mapping[Any, str]) -> str:
    """A help text with one line per choice."""
    return f"{text}\n\n\b\n" + "\n".join(f"{name}: {meaning}" for name, meaning in choices.items())


def presets() -> Mapping[str, str]:
    """Name and one-line description of every preset: the first comment of its file, in the order of their cost."""
    files = sorted((Path(ddsr_core.__file__).parent / "presets").glob("*.toml"))
    first = {path.stem: path.open(encoding="utf-8").readline().removeprefix("#").strip() for path in files}
    return dict(sorted(first.items(), key=lambda item: item[0] != "demo"))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns as wide as their widest cell; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def images_option(function: F) -> F:
    text = "Training photos: a folder, a Parquet file with an image column, or a glob pattern."
    return click.option("--images", required=True, metavar="PATH", help=text)(function)


def option_test(required: bool, text: str = "Test photos; no SR network sees them in training.") -> Option:
    if not required:
        text += " Without them, one photo in ten is held out."
    return click.option("--test", required=required, metavar="PATH", help=text)


def preset_option(default: str | None, text: str = "Settings to start from.") -> Option:
    known = presets()
    return click.option(
        "--preset",
        type=click.Choice(list(known)),
        default=default,
        show_default=default is not None,
        help=lines(text, known),
    )


def set_option(example: str, text: str = "Change one setting; may be repeated.") -> Option:
    """``--set FIELD=VALUE``."""
    return click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help=f"{text} Example: {example}.")


def config_options(function: F) -> F:
    """``--config`` and ``--set``."""
    function = set_option("sample.count=140", "Change one setting of the preset; may be repeated.")(function)
    text = "TOML or YAML file whose values override the preset. `ddsr config` prints one."
    return click.option("--config", "file", type=click.Path(path_type=Path), metavar="FILE", help=text)(function)


def complete_runs(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of runs for shell completion, from a home on this machine."""
    folder = Path(home_of(context.params.get("home"))) / "runs"
    names = sorted(path.parent.name for path in folder.glob("*/run.json")) if folder.is_dir() else []
    return [name for name in names if name.startswith(incomplete)]


def complete_networks(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Networks of runs, ``RUN:ARCH/TRAINING-SET``, and files for shell completion."""
    networks = []
    for run in complete_runs(context, parameter, ""):
        path = Path(home_of(context.params.get("home"))) / "runs" / run / "run.json"
        with suppress(DdsrError, OSError):  # nothing is completed from a damaged file
            state = parsed_state(path.read_bytes(), run, path)
            networks += [f"{run}:{record['arch']}/{record['source']}" for record in state.get("sr", [])]
    items = [CompletionItem(name) for name in dict.fromkeys(networks) if name.startswith(incomplete)]
    return [*items, CompletionItem(incomplete, type="file")]


def home_option(function: F) -> F:
    text = "Folder or s3://bucket/prefix for artifacts and runs.  [default: $DDSR_HOME, else ./ddsr-home]"
    return click.option("--home", default=None, metavar="DIR", help=text)(function)


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")(function)


def device_option(function: F) -> F:
    text = "Torch device, such as cpu or cuda:1. auto uses a GPU if there is one."
    return click.option("--device", default="auto", show_default=True, help=text)(function)


def prefect_option(function: F) -> F:
    """``--prefect`` or ``--no-prefect``; the command gets ``no_prefect``."""
    text = (
        "Whether to record the run on a Prefect server, or on a temporary one if none is set up. The results are the same.  "
        "[default: --prefect if a server is set up, for example by PREFECT_API_URL]"
    )
    return click.option("--no-prefect/--prefect", "no_prefect", default=None, callback=_without_prefect, help=text)(function)


def _without_prefect(context: click.Context, parameter: click.Parameter, value: bool | None) -> bool:
    return not names_server() if value is None else value


def run_option(default: str) -> Option:
    """``--run NAME``; ``default`` says what the name is without it."""
    text = f"Name of the run, its folder below HOME/runs.  [default: {default}]"
    return click.option("--run", "name", default=None, metavar="NAME", help=text)


def parallel_options(function: F) -> F:
    """Where the work of a run is done."""
    gpu = "Where GPU stages run. local: on this machine; pool: on the GPU work pool of the Prefect server."
    runner = "How the workers run.  [default: processes if --workers is above 1, else sequential]"
    beside = "Train small SR networks side by side on a CPU, one per core. Choose --in-turn if memory is short."
    workers = "Number of SR networks or parts of a stage to compute at once. Raise it if cores or GPUs are idle."
    return chained(
        [
            click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help=workers),
            click.option("--runner", type=click.Choice(["sequential", "threads", "processes", "ray"]), help=runner),
            click.option("--side-by-side/--in-turn", default=True, show_default=True, help=beside),
            click.option("--gpu", type=click.Choice(["local", "pool"]), default="local", show_default=True, help=gpu),
        ]
    )(function)


def chained(options: Sequence[Option]) -> Option:
    """Several options at once, in the order of the help text."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def report_to_option(function: F) -> F:
    """``--report-to PROGRAM``."""
    text = "Program that shows the training curves. Its files go to HOME/tracking."
    return click.option("--report-to", type=click.Choice(get_args(ReporterName)), default=None, help=text)(function)


#: Where a run stores its results, where it computes, and what it prints.
where_options = (home_option, device_option, parallel_options, report_to_option, prefect_option, json_option)


def run_options(function: F) -> F:
    """Options of every command that runs the pipeline: settings, the name of the run, and `where_options`."""
    decorated: F = chained([config_options, run_option("the preset"), *where_options])(function)
    return decorated
