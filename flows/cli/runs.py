"""Commands on finished runs: runs, show, report, serve, search, export, push, gc."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click

from ddsr_core.pipeline.home import home_of
from ddsr_core.pipeline.run_folder import list_runs, read_run, status_of
from ddsr_core.storage.remote_store import open_store
from flows.cli.networks import steps
from flows.cli.options import Group, complete_runs, home_option, json_option, print_table


@click.group(cls=Group, title="Results")
def finished() -> None:
    """Commands on finished runs."""


@finished.command()
@home_option
@json_option
def runs(home: str | None, as_json: bool) -> None:
    """List the runs of a home, oldest first.

    The column `best PSNR-Y` shows the best SR network of each run. Times are local.

    Example: ddsr runs
    """
    states = list_runs(open_store(home_of(home)))
    if as_json:
        click.echo(json.dumps([{**state, "status": status_of(state)} for state in states], indent=2))
        return
    if not states:
        click.echo(f"{home_of(home)} has no runs. Start with `ddsr demo`.")
    else:
        print_table([RUN_COLUMNS, *map(run_row, states)])
        for state in states:
            if state["status"] == "damaged":
                click.echo(f"{state['name']}: {state['message']}", err=True)


RUN_COLUMNS = ("run", "status", "preset", "photos", "best PSNR-Y", "started", "took")


def run_row(state: dict[str, Any]) -> tuple[str, ...]:
    """A run's cells of `RUN_COLUMNS`."""
    counts = {stage["name"]: stage.get("counts", {}) for stage in state.get("stages", [])}
    scores = [
        own["metrics"]["psnr_y"]
        for name, own in counts.items()
        if name.startswith("evaluate (") and name != "evaluate (bicubic)" and own.get("metrics", {}).get("psnr_y")
    ]
    started, finished = (
        datetime.fromisoformat(state[name]) if state.get(name) else None for name in ("started", "finished")
    )
    return (
        state["name"],
        status_of(state),
        state.get("preset") or state.get("kind", ""),
        f"{counts.get('patches', {}).get('photos', '')}",
        f"{max(scores):.2f} dB" if scores else "",
        f"{started.astimezone():%Y-%m-%d %H:%M}" if started else "",
        str(timedelta(seconds=round((finished - started).total_seconds()))) if started and finished else "",
    )


@finished.command()
@click.argument("run", shell_complete=complete_runs)
@home_option
@json_option
def show(run: str, home: str | None, as_json: bool) -> None:
    """Show the status of a run and its stages.

    Example: ddsr show demo
    """
    state = read_run(open_store(home_of(home)), run)
    if as_json:
        click.echo(json.dumps(state, indent=2))
        return
    click.echo(f"{state['name']}: {status_of(state)} ({state.get('about') or state['preset']})")
    for name in ("images", "test", "output", "started", "finished"):
        if state.get(name) not in (None, "None"):
            click.echo(f"  {name + ':':<10} {state[name]}")
    for stage in state.get("stages", []):
        origin = "from cache" if stage["cached"] else "built"
        click.echo(f"  {stage['name']:<40} {stage['key']}  {stage['seconds']:>8.1f} s  {origin}")
    if "message" in state:
        click.echo(state["message"])


@finished.command()
@click.argument("run", shell_complete=complete_runs)
@click.option("--picture", type=click.Path(path_type=Path), metavar="FILE", help="Also write an overview picture (PNG).")
@home_option
@json_option
def report(run: str, picture: Path | None, home: str | None, as_json: bool) -> None:
    """Regenerate the report of a run.

    Example: ddsr report demo --picture overview.png
    """
    from flows.cli.reports import rewrite_report  # imports the report, pyarrow and matplotlib

    written = rewrite_report(open_store(home_of(home)), run, picture)
    if as_json:
        click.echo(
            json.dumps({name.lower().replace(" ", "_"): path for name, path in written.items()}, indent=2, default=str)
        )
        return
    for name, path in written.items():
        click.echo(f"{name}: {path}")


@finished.command()
@click.option("--host", default="127.0.0.1", show_default=True,
              help="Address to listen on. With 0.0.0.0, everybody who reaches it can read the reports.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=4280, show_default=True, help="Port; 0 chooses a free one.")
@home_option
@json_option
def serve(host: str, port: int, home: str | None, as_json: bool) -> None:
    """Serve the reports of a home to browsers.

    Read-only: only reports and their tables are served, no photos and no images of the sets. Set DDSR_REPORTS_URL to the
    address that is printed, in the environment of the workers, and pages in the Prefect UI link to the reports. Ctrl-C ends
    it.

    Example: ddsr serve --port 4280
    """
    from ddsr_core.report.serve import report_server, reports_of  # imports the store of this home

    store = open_store(home_of(home))
    with report_server(store, host, port) as server:
        name = f"[{host}]" if ":" in host else host
        address, count = f"http://{name}:{server.server_port}", len(reports_of(store))
        if as_json:
            click.echo(json.dumps({"url": address, "home": store.url, "reports": count}))
        else:
            click.echo(f"{count} reports of {store.url}: {address}")
            click.echo(f"For links in the Prefect UI: export DDSR_REPORTS_URL={address}")
        server.serve_forever()


@finished.command()
@click.argument("text", required=False)
@click.option("--image", type=click.Path(path_type=Path), metavar="FILE", help="Image to find similar patches for.")
@click.option(
    "--run",
    "name",
    default="demo",
    show_default=True,
    metavar="NAME",
    shell_complete=complete_runs,
    help="Run whose patches are searched.",
)
@click.option("-k", "count", type=click.IntRange(1), default=12, show_default=True, help="Number of patches to find.")
@click.option(
    "--sheet", type=click.Path(path_type=Path), metavar="FILE", help="Also write the patches as a contact sheet (PNG)."
)
@home_option
@json_option
def search(text: str | None, image: Path | None, name: str, count: int, sheet: Path | None, home: str | None,
           as_json: bool) -> None:  # fmt: skip
    """Find patches of a run by text or by image.

    A search by text requires a run with embeddings.backend=open_clip.

    Example: ddsr search --image wave.jpg --run demo --sheet found.png
    """
    if (text is None) == (image is None):
        raise click.UsageError("Give either a text or --image FILE.")
    rows = steps().search_run(open_store(home_of(home)), name, image or text or "", count, sheet)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        click.echo(f"{row['cosine']:.4f}  {row['patch_id']}  cluster {row['pseudo_label']}  {row['photo']}")
    if sheet is not None:
        click.echo(f"Sheet: {sheet}")


@finished.command()
@click.argument("source", metavar="RUN|ADAPTER", shell_complete=complete_runs)
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="New folder to write to.")
@click.option("--format", "kind", type=click.Choice(["original", "diffusers"]), default="original", show_default=True,
              help="original: one file in the layout of the DiT release. diffusers: a folder for DiTPipeline.")  # fmt: skip
@click.option("--weights", type=click.Choice(["ema", "raw"]), default="ema", show_default=True,
              help="ema: weights averaged over training, as used by the run. raw: weights of the last step.")  # fmt: skip
@click.option("--base", metavar="MODEL", help="Base model; required if the folder of an adapter is given instead of a run.")
@click.option("--vae", metavar="MODEL", help="VAE, if not the one of the base model.")
@click.option("--run", "name", default=None, help="Name of the export's own run below HOME/runs.  [default: export-RUN]")
@home_option
@json_option
def export(source: str, out: Path, kind: str, weights: str, name: str | None, home: str | None, as_json: bool,
           **models: str | None) -> None:  # fmt: skip
    """Export the fine-tuned diffusion model of a run.

    The DiffFit parameters are merged into the weights, so other programs can load them without ddsr.

    Example: ddsr export demo --out my-dit --format diffusers
    """
    done = steps().export_model(home_of(home), source=source, output=out, layout=kind, weights=weights, run=name, **models)
    folder = done.output
    if as_json:
        click.echo(json.dumps({"run": done.run, "model": str(folder), "format": kind, "weights": weights}, indent=2))
        return
    click.echo(f"Model: {folder}")
    if kind == "diffusers":
        click.echo("diffusers computes timestep frequencies slightly differently; two lines in README.md correct that.")
    click.echo((folder / "README.md").read_text().splitlines()[-1])


@finished.command()
@click.argument("run", shell_complete=complete_runs)
@click.argument("repository", metavar="ORGANIZATION/NAME")
@click.option("--network", metavar="ARCH/TRAINING-SET", help="Push this SR network instead, such as edsr-small/distilled.")
@click.option("--private", is_flag=True, help="Make the repository private if the push creates it.")
@click.option("--dry-run", is_flag=True, help="Only list what would be uploaded. Needs no connection.")
@home_option
@json_option
def push(run: str, repository: str, network: str | None, private: bool, dry_run: bool, home: str | None,
         as_json: bool) -> None:  # fmt: skip
    """Push a distilled set to the Hugging Face Hub.

    The set is uploaded with its card, which names its origin, scores and licenses. Read the card before you share it:
    runs/RUN/distilled/README.md.

    Example: ddsr push demo my-organization/demo-distilled --dry-run
    """
    from flows.cli.hub import Push, push  # imports huggingface_hub and the report

    files = push(open_store(home_of(home)), run, Push(repository, network, private), dry_run)
    if as_json:
        click.echo(json.dumps({"repository": repository, "dry_run": dry_run, "files": files}, indent=2))
        return
    if dry_run:
        for name, size in files.items():
            click.echo(f"{size:>12,}  {name}")
    verb = "Would upload" if dry_run else "Uploaded"
    click.echo(f"{verb} {len(files)} files, {sum(files.values()) / 1e6:.1f} MB, to {repository}")


@finished.command()
@click.option("--delete", is_flag=True, help="Remove the artifacts. Without it, they are only listed.")
@click.option("--nights", type=click.IntRange(1), metavar="N",
              help="For each nightly series, keep only the last N versions and rollback steps.  [default: all]")  # fmt: skip
@home_option
@json_option
def gc(delete: bool, nights: int | None, home: str | None, as_json: bool) -> None:
    """Remove artifacts that no run or nightly version uses.

    Artifacts of active and failed runs are kept. Files that ddsr did not create are left alone, and a folder that is not a
    home is refused.

    Example: ddsr gc --delete
    """
    from ddsr_core.gc import ago, artifact_folders, collect_garbage  # imports the pipeline

    store = open_store(home_of(home))
    removed = collect_garbage(store, delete, nights)
    left = {str(folder): reason for folder, reason in artifact_folders(store) if reason}
    if as_json:
        artifacts = [{"path": str(item.place), "bytes": item.bytes, "what": item.what} for item in removed]
        click.echo(json.dumps({"deleted": delete, "artifacts": artifacts, "left": left}, indent=2))
        return
    for item in removed:
        click.echo(f"{'removed' if delete else 'would remove'} {item.what}, {ago(item.made)} ({size_text(item.bytes)})")
        click.echo(f"    {item.place}")
    for folder, reason in left.items():
        click.echo(f"left alone {folder}: {reason}")
    total = sum(item.bytes for item in removed)
    hint = "" if delete or not removed else ". Remove them with `ddsr gc --delete`."
    click.echo(f"{len(removed)} folders, {size_text(total)}{hint}")


def size_text(size: int) -> str:
    """
    >>> size_text(123_456), size_text(2_000_000_000)
    ('0.1 MB', '2.0 GB')
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
