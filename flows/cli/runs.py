"""Commands on what has been run: runs, show, report, search, export, gc."""

from __future__ import annotations

import json
from pathlib import Path

import click

from flows.cli.options import Group, home_option, json_option
from flows.cli.running import home_of


@click.group(cls=Group)
def finished() -> None:
    """Commands on what has been run."""


@finished.command()
@home_option
@json_option
def runs(home: str | None, as_json: bool) -> None:
    """List the runs of a home folder.

    Example: ddsr runs
    """
    from ddsr_core.pipeline.run_folder import list_runs
    from ddsr_core.storage.remote_store import open_store

    states = list_runs(open_store(home_of(home)))
    if as_json:
        click.echo(json.dumps(states, indent=2))
        return
    if not states:
        click.echo(f"no runs in {home_of(home)}; start with: ddsr demo")
    for state in states:
        click.echo(f"{state['name']:<24} {state['status']:<10} {state['preset']:<9} {state.get('started', '')}")


@finished.command()
@click.argument("run")
@home_option
@json_option
def show(run: str, home: str | None, as_json: bool) -> None:
    """Status, stages, keys and durations of a run.

    Example: ddsr show demo
    """
    from ddsr_core.pipeline.run_folder import read_run
    from ddsr_core.storage.remote_store import open_store

    state = read_run(open_store(home_of(home)), run)
    if as_json:
        click.echo(json.dumps(state, indent=2))
        return
    click.echo(f"{state['name']}: {state['status']} ({state['preset']})")
    for stage in state.get("stages", []):
        origin = "cache" if stage["cached"] else "built"
        click.echo(f"  {stage['name']:<40} {stage['key']}  {stage['seconds']:>8.1f} s  {origin}")
    if "message" in state:
        click.echo(state["message"])


@finished.command()
@click.argument("run")
@click.option("--picture", type=click.Path(path_type=Path), default=None, help="also write an overview picture (PNG)")
@home_option
def report(run: str, picture: Path | None, home: str | None) -> None:
    """Write a run's report again from its artifacts, and say where it is.

    Example: ddsr report demo --picture overview.png
    """
    from ddsr_core.pipeline.run_folder import run_folder
    from ddsr_core.pipeline.run_state import read_record
    from ddsr_core.report.html import overview_figure, write_report
    from ddsr_core.storage.remote_store import open_store

    store = open_store(home_of(home))
    record = read_record(store, run)
    click.echo(f"Report: {write_report(run_folder(store, run), record)}")
    store.push(f"runs/{run}")
    if picture is not None:
        click.echo(f"Picture: {overview_figure(record, picture)}")


@finished.command()
@click.argument("text", required=False)
@click.option("--image", type=click.Path(path_type=Path), default=None, help="find patches that look like this image")
@click.option("--run", "name", default="demo", show_default=True, help="run whose patches are searched")
@click.option("-k", "count", type=click.IntRange(1), default=12, show_default=True, help="how many")
@click.option("--sheet", type=click.Path(path_type=Path), default=None, help="write a contact sheet (PNG)")
@home_option
@json_option
def search(text: str | None, image: Path | None, name: str, count: int, sheet: Path | None, home: str | None,
           as_json: bool) -> None:  # fmt: skip
    """Search a run's patches by text (open_clip) or by an image.

    Example: ddsr search --image wave.jpg --run demo --sheet found.png
    """
    from ddsr_core.pipeline.steps import search_run
    from ddsr_core.storage.remote_store import open_store

    if (text is None) == (image is None):
        raise click.UsageError("give either a text or --image FILE")
    rows = search_run(open_store(home_of(home)), name, image or text or "", count, sheet)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        click.echo(f"{row['cosine']:.4f}  {row['patch_id']}  cluster {row['pseudo_label']}  {row['photo']}")
    if sheet is not None:
        click.echo(f"Sheet: {sheet}")


@finished.command()
@click.argument("source", metavar="RUN|ADAPTER")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="new folder to write to")
@click.option("--format", "kind", type=click.Choice(["original", "diffusers"]), default="original", show_default=True,
              help="one file in the original DiT layout, or a folder for diffusers' DiTPipeline")  # fmt: skip
@click.option(
    "--weights", type=click.Choice(["ema", "raw"]), default="ema", show_default=True, help="averaged or last weights"
)
@click.option("--base", default=None, help="base model, if an adapter's folder is given instead of a run")
@click.option("--vae", default=None, help="VAE, if it is not the base's own")
@home_option
def export(source: str, out: Path, kind: str, weights: str, base: str | None, vae: str | None, home: str | None) -> None:
    """Write a run's fine-tuned diffusion model, DiffFit folded in, for use without ddsr.

    Example: ddsr export demo --out my-dit --format diffusers
    """
    from ddsr_core.storage.remote_store import open_store
    from flows.cli.single_steps import export_model

    folder = export_model(open_store(home_of(home)), source, out, kind, weights, base, vae)
    click.echo(f"Model: {folder}")
    if kind == "diffusers":
        click.echo("Timestep frequencies are diffusers', a little off the original's: two lines in README.md correct them.")
    click.echo((folder / "README.md").read_text().splitlines()[-1])


@finished.command()
@click.option("--delete", is_flag=True, help="really remove; without it, only say what would be removed")
@click.option("--nights", type=click.IntRange(1), default=None,
              help="of `ddsr nightly`, keep the last so many versions and steps back (default: all)")  # fmt: skip
@home_option
def gc(delete: bool, nights: int | None, home: str | None) -> None:
    """Remove artifacts, finished or not, that no run and no nightly version uses.

    Example: ddsr gc --delete
    """
    from ddsr_core.storage.remote_store import open_store
    from flows.cli.housekeeping import collect_garbage

    removed = collect_garbage(open_store(home_of(home)), delete, nights)
    for path, size in removed:
        click.echo(f"{'removed' if delete else 'would remove'} {path} ({size / 1e6:.1f} MB)")
    total = sum(size for _, size in removed) / 1e6
    click.echo(
        f"{len(removed)} folders, {total:.1f} MB" + ("" if delete or not removed else "; remove with: ddsr gc --delete")
    )
