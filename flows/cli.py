"""The command ``ddsr``. Exit codes: 0 done, 1 failed (what, where, how to mend), 2 wrong usage."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from ddsr_core import __version__
from ddsr_core.errors import DdsrError, StorageError
from flows.running import home_of, run_pipeline

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


class SourceType(click.ParamType):
    """A `ddsr_core.pipeline.SourceName`; the names are looked up when they are needed, as that import takes a second."""

    name = "source"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join(self.names())}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value not in self.names():
            self.fail(f"{value!r} is not one of {', '.join(self.names())}.", param, ctx)
        return value

    @staticmethod
    def names() -> tuple[str, ...]:
        from ddsr_core.pipeline import SourceName

        return get_args(SourceName)


def home_option(function: F) -> F:
    text = "where artifacts and runs are kept: a folder or s3://bucket/prefix (default: $DDSR_HOME, else ./ddsr-home)"
    return click.option("--home", default=None, help=text)(function)


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="print JSON on standard output")(function)


def device_option(function: F) -> F:
    return click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 …")(function)


def run_options(function: F) -> F:
    """The options of commands that run the pipeline."""
    for option in (
        click.option("--config", "file", type=click.Path(path_type=Path), help="TOML file laid over the preset"),
        click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="one field; may be repeated"),
        click.option("--run", "name", default=None, help="name of the run below HOME/runs (default: the preset's name)"),
        click.option("--no-prefect", is_flag=True, help="run the stages directly: same keys, same bytes"),
        home_option, device_option, json_option,
    ):  # fmt: skip
        function = option(function)
    return function


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
    from ddsr_core.demo_data import write_demo_photos
    from ddsr_core.remote_store import open_store
    from ddsr_core.store import storage_errors

    home = open_store(home_of(options["home"])).home
    with storage_errors(home):
        images, test = write_demo_photos(home / "demo-photos")
    run_pipeline(images=images, test=test, preset="demo", **options)


@cli.command()
@click.option("--images", required=True, help="folder of photos, Parquet with an image column, or a glob pattern")
@click.option("--test", default=None, help="test photos; without it one photo in ten is held out")
@click.option("--preset", default="demo", show_default=True, help="demo, released, paper or best")
@run_options
def distill(images: str, test: str | None, preset: str, **options: Any) -> None:
    """Distill a folder of photos, train SR networks on the result and compare.

    Example: ddsr distill --images photos/ --preset demo --set sample.count=140
    """
    run_pipeline(images=Path(images), test=None if test is None else Path(test), preset=preset, **options)


@cli.command()
@click.argument("experiment", type=click.Choice(["ablation", "table1", "table2", "table3", "sources", "starts", "budget"]))
@click.option("--images", required=True, help="folder of photos, Parquet with an image column, or a glob pattern")
@click.option("--test", required=True, help="test photos")
@click.option("--preset", default=None, help="demo, released, paper or best; without it demo for mini, best for paper")
@click.option("--scale", type=click.Choice(["mini", "paper"]), default="mini", show_default=True,
              help="mini: small networks and few images, for two cores; paper: the paper's")  # fmt: skip
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="how many seeds, from 0")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="networks that are trained at once")
@run_options
def reproduce(experiment: Any, images: str, test: str, **options: Any) -> None:
    """Fill the paper's tables, or measure what each part of the method is worth.

    Every training set of a column has as many images, every network as many iterations.

    Example: ddsr reproduce table2 --images photos/ --test B100/ --scale mini --seeds 3
    """
    from flows.running import run_experiment

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


@cli.command("train-sr")
@click.option("--data", required=True, help="folder of HR images, an image set, a patches artifact, or Parquet")
@click.option("--arch", default="edsr-small", show_default=True, help="network; an unknown name lists them all")
@click.option("--source", type=SourceType(), default="full", show_default=True,
              help="random, threshold, k-centre, hdc, loss-ranked and full-thresholded cut crops out of DATA; "
                   "the others train on DATA as it is")  # fmt: skip
@click.option("--budget", type=click.IntRange(1), default=70, show_default=True, help="crops that are chosen")
@click.option("--patch-px", type=click.IntRange(16), default=64, show_default=True, help="size of those crops")
@click.option("--embeddings", type=click.Choice(["vgg16", "open_clip"]), default="vgg16", show_default=True,
              help="features that k-centre and hdc compare crops by")  # fmt: skip
@click.option("--iterations", type=click.IntRange(1), default=2000, show_default=True, help="optimiser steps")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="a field of the recipe, e.g. batch_size=8")
@home_option
@device_option
@json_option
def train_sr(data: str, arch: str, source: str, budget: int, patch_px: int, embeddings: str, iterations: int,
             overrides: tuple[str, ...], home: str | None, device: str, as_json: bool) -> None:  # fmt: skip
    """Train one SR network on any folder of images.

    Example: ddsr train-sr --data ddsr-home/runs/demo/distilled --arch edsr-small --iterations 5000
    """
    from ddsr_core.images import photo_source
    from ddsr_core.remote_store import open_store
    from flows.single import Crops, train_one

    store = open_store(home_of(home))
    store.check()
    crops = Crops(source, budget, patch_px, embeddings)
    artifact, cached = train_one(
        store, photo_source(data), crops, arch=arch, iterations=iterations, overrides=overrides, device=device
    )
    facts = {"weights": artifact.path / "weights.safetensors", "cached": cached, **artifact.manifest.counts}
    if as_json:
        click.echo(json.dumps(facts, indent=2, default=str))
    else:
        click.echo(f"Weights: {facts['weights']} (and .pth){' from cache' if cached else ''}")


@cli.command()
@click.option("--weights", required=True, multiple=True, help="weights file, train-sr folder, or bicubic; may be repeated")
@click.option("--test", required=True, help="folder of HR images, or of HR-LR pairs (HR/ and LRx4/, …)")
@click.option("--json", "json_file", type=click.Path(path_type=Path), default=None,
              help="write the metrics to this file; a list where several weights are named")  # fmt: skip
@click.option("--scale", type=click.IntRange(2, 8), default=4, show_default=True, help="enlargement of the networks")
@click.option("--mod-crop", type=click.IntRange(1), default=None,
              help="HR sides become a multiple of it (default: the scale; OST300: 8)")  # fmt: skip
@click.option("--no-lpips", is_flag=True, help="leave LPIPS out")
@click.option("--lpips-vgg", is_flag=True, help="measure LPIPS with VGG16 too")
@click.option("--dists", is_flag=True, help="measure DISTS too")
@click.option("--round-y", is_flag=True, help="round Y to 8 bits, as MATLAB's published figures do and BasicSR does not")
@home_option
@device_option
def evaluate(weights: tuple[str, ...], test: str, json_file: Path | None, scale: int, mod_crop: int | None, no_lpips: bool,
             lpips_vgg: bool, dists: bool, round_y: bool, home: str | None, device: str) -> None:  # fmt: skip
    """PSNR and SSIM on Y and RGB, and LPIPS, of SR networks, with bicubic beside them.

    Example: ddsr evaluate --weights bicubic --test B100/
    """
    from ddsr_core.evaluation import EvaluateConfig
    from ddsr_core.remote_store import open_store
    from ddsr_core.store import write_json
    from flows.console import print_results
    from flows.single import evaluate_networks, with_overrides

    store = open_store(home_of(home))
    store.check()
    values = {"scale": scale, "mod_crop": mod_crop or scale, "round_y": round_y}
    metrics = {"lpips": not no_lpips, "lpips_vgg": lpips_vgg, "dists": dists}
    config = with_overrides(EvaluateConfig, {**values, **metrics}, [])
    artifacts = evaluate_networks(store, weights, Path(test), config, device)
    summaries = {name: json.loads((artifact.path / "summary.json").read_text()) for name, artifact in artifacts.items()}
    if json_file is not None:
        write_json(json_file, summaries[weights[0]] if len(weights) == 1 else [summaries[name] for name in weights])
    rows = [{"arch": facts["network"], "source": name, **facts["metrics"]} for name, facts in summaries.items()]
    print_results(rows, title=f"SR networks on the test photos (x{scale})", origin="weights")
    for name, artifact in artifacts.items():
        click.echo(f"{name}: {summaries[name]['images']} images; each one: {artifact.path / 'per_image.parquet'}")


@cli.command()
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--weights", required=True, type=click.Path(path_type=Path), help="any of ours, or what spandrel reads")
@click.option("--tile", type=click.IntRange(0), default=512, show_default=True, help="tile side in pixels; 0: never")
@click.option("--scale", type=click.IntRange(2), default=None, help="stop where the weights enlarge by another factor")
@click.option("--existing", type=click.Choice(["refuse", "overwrite", "skip"]), default="refuse", show_default=True,
              help="what to do with output files that are there")  # fmt: skip
@device_option
def upscale(source: Path, output: Path, weights: Path, tile: int, scale: int | None, existing: str,
            device: str) -> None:  # fmt: skip
    """Enlarge an image or a folder of images, by as much as the network enlarges (the weights say).

    Transparency is kept; the results are 8-bit PNG files.

    Example: ddsr upscale small/ large/ --weights ddsr-home/…/weights.safetensors
    """
    from ddsr_core.config import Runtime, resolve_device
    from ddsr_core.upscale import upscale as enlarge
    from flows.console import progress_for

    runtime = Runtime(device=resolve_device(device), progress=progress_for())
    done = enlarge(source, output, weights, scale=scale, tile_px=tile, existing=existing, runtime=runtime)  # type: ignore[arg-type]
    kept = f", {len(done.kept)} kept" if done.kept else ""
    click.echo(f"{done.network} x{done.scale}: {len(done.written)} written, {len(done.skipped)} skipped{kept}: {output}")
    for path, reason in done.skipped.items():
        click.echo(f"  {path}: {reason}")


@cli.command()
@click.option("--images", required=True, help="folder of photos, Parquet with an image column, or a glob pattern")
@click.option("--test", required=True, help="photos that SR networks trained on the old and the new set are measured on")
@click.option("--preset", default="demo", show_default=True, help="demo, released, paper or best")
@click.option("--name", default="nightly", show_default=True, help="of the succession, HOME/nightly/NAME")
@click.option("--metric", type=click.Choice(["psnr_y", "psnr_rgb", "ssim_y", "ssim_rgb", "lpips"]), default="psnr_y",
              show_default=True, help="what both sets are compared by")  # fmt: skip
@click.option("--margin", type=click.FloatRange(0), default=0.0, show_default=True,
              help="how much worse the new set may be, in the metric's unit")  # fmt: skip
@click.option("--cold", is_flag=True, help="always fine-tune from the base, never from the last adapter")
@click.option("--warm-steps", type=click.IntRange(0), default=None, help="steps of a fine-tuning from the last adapter")
@click.option("--config", "file", type=click.Path(path_type=Path), help="TOML file laid over the preset")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="one field; may be repeated")
@click.option("--no-prefect", is_flag=True, help="run the stages directly: same keys, same bytes")
@home_option
@device_option
@json_option
def nightly(images: str, test: str, cold: bool, **options: Any) -> None:
    """Distil again if photos or settings have changed; keep the new set only if it is not worse.

    The current set is HOME/nightly/NAME/current. On a schedule: the deployment `nightly`.

    Example: ddsr nightly --images photos/ --test B100/
    """
    from flows.running import run_night

    run_night(images=Path(images), test=Path(test), warm=not cold, **options)


@cli.command()
@click.option("--name", default="nightly", show_default=True, help="of the succession")
@home_option
@json_option
def versions(name: str, home: str | None, as_json: bool) -> None:
    """List what `ddsr nightly` has made; the one in use is marked.

    Example: ddsr versions
    """
    from ddsr_core.registry import read_registry
    from ddsr_core.remote_store import open_store

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


@cli.command()
@click.argument("to", type=int, required=False)
@click.option("--name", default="nightly", show_default=True, help="of the succession")
@home_option
def rollback(to: int | None, name: str, home: str | None) -> None:
    """Put an earlier distilled set in use again: version TO, or the champion before this one.

    Example: ddsr rollback
    """
    from ddsr_core.remote_store import open_store
    from flows.challenge import roll_back

    registry = roll_back(open_store(home_of(home)), name, to)
    click.echo(f"in use: version {registry.champion}")


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

    from flows.deploying import deploy as bring_up

    for what, verdict in bring_up(gpus, pool_type, timedelta(seconds=silence)):
        click.echo(f"{verdict:<10} {what}")
    click.echo("Workers: prefect worker start --pool cpu --type process; one for each GPU: "
               "CUDA_VISIBLE_DEVICES=0 prefect worker start --pool cuda --type process --limit 1")  # fmt: skip


@cli.command()
@home_option
@json_option
def runs(home: str | None, as_json: bool) -> None:
    """List the runs of a home folder.

    Example: ddsr runs
    """
    from ddsr_core.remote_store import open_store
    from flows.runs import list_runs

    states = list_runs(open_store(home_of(home)))
    if as_json:
        click.echo(json.dumps(states, indent=2))
        return
    if not states:
        click.echo(f"no runs in {home_of(home)}; start with: ddsr demo")
    for state in states:
        click.echo(f"{state['name']:<24} {state['status']:<10} {state['preset']:<9} {state.get('started', '')}")


@cli.command()
@click.argument("run")
@home_option
@json_option
def show(run: str, home: str | None, as_json: bool) -> None:
    """Stages, keys, durations and results of a run.

    Example: ddsr show demo
    """
    from ddsr_core.remote_store import open_store
    from flows.runs import read_run

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


@cli.command()
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
    from ddsr_core.remote_store import open_store
    from flows.single import export_model

    folder = export_model(open_store(home_of(home)), source, out, kind, weights, base, vae)
    click.echo(f"Model: {folder}")
    if kind == "diffusers":
        click.echo("Timestep frequencies are diffusers', a little off the original's: two lines in README.md mend them.")
    click.echo((folder / "README.md").read_text().splitlines()[-1])


@cli.command("export-sr")
@click.argument("weights", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT.onnx", type=click.Path(path_type=Path))
def export_sr(weights: Path, output: Path) -> None:
    """Write an SR network as ONNX, for images of any size, and compare its images with PyTorch's.

    WEIGHTS is a train-sr folder or a weights file. For programs that read PyTorch's files nothing is to be exported:
    weights.pth and weights.safetensors in the folder have the names of the networks' authors.

    Example: ddsr export-sr ddsr-home/artifacts/train-sr/KEY x4.onnx
    """
    from flows.single import export_network

    network, differences = export_network(weights, output)
    click.echo(f"{network.name} x{network.scale}: {output}")
    for (height, width), difference in differences.items():
        click.echo(f"  LR of {height}x{width} px: largest difference between onnxruntime and PyTorch {difference:.1e}")


@cli.command()
@click.argument("run")
@click.option("--picture", type=click.Path(path_type=Path), default=None, help="also write an overview picture (PNG)")
@home_option
def report(run: str, picture: Path | None, home: str | None) -> None:
    """Write a run's report again from its artifacts, and say where it is.

    Example: ddsr report demo --picture overview.png
    """
    from ddsr_core.remote_store import open_store
    from ddsr_core.report import overview_figure, write_report
    from flows.runs import read_record, run_folder

    store = open_store(home_of(home))
    record = read_record(store, run)
    click.echo(f"Report: {write_report(run_folder(store, run), record)}")
    store.push(f"runs/{run}")
    if picture is not None:
        click.echo(f"Picture: {overview_figure(record, picture)}")


@cli.command()
@click.option("--delete", is_flag=True, help="really remove; without it, only say what would be removed")
@click.option("--nights", type=click.IntRange(1), default=None,
              help="of `ddsr nightly`, keep the last so many versions and steps back (default: all)")  # fmt: skip
@home_option
def gc(delete: bool, nights: int | None, home: str | None) -> None:
    """Remove unfinished artifacts and those that no run and no nightly version uses.

    Example: ddsr gc --delete
    """
    from ddsr_core.remote_store import open_store
    from flows.housekeeping import collect_garbage

    removed = collect_garbage(open_store(home_of(home)), delete, nights)
    for path, size in removed:
        click.echo(f"{'removed' if delete else 'would remove'} {path} ({size / 1e6:.1f} MB)")
    total = sum(size for _, size in removed) / 1e6
    click.echo(
        f"{len(removed)} folders, {total:.1f} MB" + ("" if delete or not removed else "; remove with: ddsr gc --delete")
    )


@cli.command()
@home_option
@json_option
def doctor(home: str | None, as_json: bool) -> None:
    """Check this machine: packages, weights, device, disk, Prefect.

    Example: ddsr doctor
    """
    from flows.housekeeping import examine

    checks = examine(home_of(home))
    if as_json:
        click.echo(json.dumps([check.__dict__ for check in checks], indent=2))
    else:
        for check in checks:
            click.echo(f"{check.verdict:<5} {check.subject}: {check.finding}")
            if check.mend:
                click.echo(f"      mend: {check.mend}")
    if any(check.verdict == "FAIL" for check in checks):
        sys.exit(1)


@cli.command()
@click.option("--photos", type=click.Path(path_type=Path), default=None, help="photographs (default: Debian's wallpapers)")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="folder for the base model")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="a field of the recipe, e.g. prior_steps=100")
def pretrain(photos: Path | None, out: Path, overrides: tuple[str, ...]) -> None:
    """Train a base model like ddsr-tiny from a folder of photographs.

    Example: ddsr pretrain --out my-base --photos photos/
    """
    from flows.single import pretrain_base

    click.echo(f"Base model: {pretrain_base(photos, out, overrides)}")


@cli.command()
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
    from ddsr_core.remote_store import open_store
    from flows.single import search_run

    if (text is None) == (image is None):
        raise click.UsageError("give either a text or --image FILE")
    rows = search_run(open_store(home_of(home)), name, text, image, count, sheet)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        click.echo(f"{row['cosine']:.4f}  {row['patch_id']}  cluster {row['pseudo_label']}  {row['photo']}")
    if sheet is not None:
        click.echo(f"Sheet: {sheet}")


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
