"""Commands on one SR network: train-sr, evaluate, upscale, export-sr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import click

from ddsr_core.baselines.names import TRAINING_SETS
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.metrics.spec import METRICS
from ddsr_core.pipeline.config import checked
from ddsr_core.pipeline.home import home_of
from ddsr_core.pipeline.run_folder import find_weights
from ddsr_core.pseudo_labels.names import EMBEDDERS
from ddsr_core.sr.config import VALIDATIONS, Degradation
from ddsr_core.storage.files import write_json
from ddsr_core.storage.remote_store import open_store
from flows.cli.options import Group, complete_networks, device_option, home_option, json_option, report_to_option

#: Options of the validation, and their fields in its config.
VALIDATION_OPTIONS = {"val_every": "every", "val_metrics": "metrics", "early_stop": "early_stop"}

#: Exit code of a command that has done what it could and has left out some of its input files.
SOME_SKIPPED = 3
#: Skipped files that are named for each reason.
SHOWN_SKIPS = 3

trust_option = click.option("--trust", is_flag=True, help="Allow weights files to import your own network (module:Class).")


@click.group(cls=Group, title="SR networks")
def networks() -> None:
    """Commands on one SR network."""


def steps() -> Any:
    """The functions behind the commands, imported late: they import torch, and `ddsr --help` must not wait for that."""
    from flows.cli import single_steps

    return single_steps


@networks.command("train-sr")
@click.option("--data", required=True, metavar="DATA", help="Folder of HR images, image set, patches artifact, or Parquet.")
@click.option("--arch", default="edsr-small", show_default=True,
              help="Name of the network, or module:Class of your own. An unknown name prints all names.")  # fmt: skip
@click.option("--iterations", type=click.IntRange(1), default=2000, show_default=True, help="Optimizer steps.")
@click.option("--scale", type=click.Choice(["2", "3", "4"]), default="4", show_default=True, help="Upsampling factor.")
@click.option("--degradation", type=click.Choice(get_args(Degradation)), default="bicubic", show_default=True,
              help="How LR images are made. real-esrgan: random blur, noise and JPEG, for unknown photos.")  # fmt: skip
@click.option("--init", type=click.Path(path_type=Path), default=None,
              help="Start from these weights: a train_sr folder, or a file of the same network and scale.")  # fmt: skip
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True,
              help="Processes that share every batch, one per GPU. The batch size must be a multiple of it.")  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE",
              help="Change one field of the recipe; may be repeated. Example: batch_size=8.")  # fmt: skip
@click.option("--training-set", "--source", "training_set", type=click.Choice(list(TRAINING_SETS)), default="full",
              show_default=True,
              help="full trains on all of DATA. gsdd, base and distilled do too, and check that DATA is such a set. The "
                   "others train on crops of DATA.")  # fmt: skip
@click.option("--count", "--budget", "count", type=click.IntRange(1), default=70, show_default=True,
              help="Number of crops, for training sets that consist of crops of DATA.")  # fmt: skip
@click.option("--patch-px", type=click.IntRange(16), default=64, show_default=True,
              help="Height and width of these crops in pixels.")  # fmt: skip
@click.option("--embeddings", type=click.Choice(list(EMBEDDERS)), default="vgg16", show_default=True,
              help="Features that k-center and hdc compare crops by.")  # fmt: skip
@click.option("--test", type=click.Path(path_type=Path), default=None,
              help="Photos to validate on during training; those among DATA are left out of training. The best weights "
                   "are stored in addition to the last ones.")  # fmt: skip
@click.option("--val-every", type=click.IntRange(1), default=None,
              help="Steps between validations.  [default: a tenth of the iterations]")  # fmt: skip
@click.option("--val-metric", "val_metrics", multiple=True, type=click.Choice(list(METRICS)),
              help="Metric to validate with; may be repeated. The first one decides which weights are best.  "
                   "[default: psnr_y, ssim_y]")  # fmt: skip
@click.option("--early-stop", type=click.IntRange(1), default=None,
              help="Stop after this many validations without a new best.")  # fmt: skip
@click.option("--run", "name", default=None, help="Name of the run below HOME/runs.  [default: network and data]")
@home_option
@device_option
@report_to_option
@json_option
def train_sr(data: str, iterations: int, name: str | None, home: str | None, as_json: bool, **options: Any) -> None:
    """Train one SR network on a folder of images.

    Example: ddsr train-sr --data ddsr-home/runs/demo/distilled --arch edsr-small --iterations 5000
    """
    validation = validation_of(options, iterations)
    options["scale"] = int(options["scale"])
    options["overrides"] = (f"processes={options.pop('processes')}", *options["overrides"])
    trained = steps().train_one(home_of(home), data=data, iterations=iterations, run=name, validation=validation, **options)
    artifact, cached = trained.weights, trained.cached
    weights = artifact.path / "weights.safetensors"
    best = {"best_weights": artifact.path / "best/weights.safetensors"} if validation else {}
    facts = {"cached": cached, "left_out": trained.left_out}
    result = {"run": trained.run, "weights": weights, **best, **facts, **artifact.manifest.counts}
    if as_json:
        click.echo(json.dumps(result, indent=2, default=str))
        return
    click.echo(f"Run: {trained.run}. Weights: {weights} (and .pth){' from cache' if cached else ''}")
    if validation:
        values = ", ".join(f"{METRICS[name].label} {METRICS[name].text(value)}" for name, value in result["best"].items())
        click.echo(f"Best of the validation (step {result['best_step']}: {values}): {result['best_weights']}")


def validation_of(options: dict[str, Any], iterations: int) -> dict[str, Any] | None:
    """Remove the validation options from ``options`` and return them; None without test photos."""
    given = {name: options.pop(option) for option, name in VALIDATION_OPTIONS.items()}
    chosen = {name: value for name, value in given.items() if value}
    if options["test"] is None:
        if chosen:
            raise click.UsageError("--val-every, --val-metric and --early-stop need --test.")
        return None
    return {"every": max(1, iterations // VALIDATIONS), **chosen}


@networks.command()
@click.option("--weights", required=True, multiple=True, shell_complete=complete_networks,
              help="Weights file, train_sr folder, network of a run such as demo:edsr-small/distilled, or bicubic; may "
                   "be repeated.")  # fmt: skip
@click.option("--test", required=True, metavar="TEST", help="Folder of HR images, or of HR-LR pairs (HR/ and LRx4/, …).")
@click.option("--scale", type=click.IntRange(2, 8), default=4, show_default=True, help="Upsampling factor of the networks.")
@click.option("--metric", "more_metrics", multiple=True, type=click.Choice(list(METRICS)),
              help="Measure this metric, too; may be repeated.")  # fmt: skip
@click.option("--no-lpips", is_flag=True, help="Do not measure LPIPS, which takes most of the time on a CPU.")
@click.option("--lpips-vgg", is_flag=True, hidden=True, help="The same as --metric lpips_vgg.")
@click.option("--dists", is_flag=True, hidden=True, help="The same as --metric dists.")
@click.option("--degradation", type=click.Choice(get_args(Degradation)), default="bicubic", show_default=True,
              help="How LR images are made if TEST contains none, as in train-sr.")  # fmt: skip
@click.option("--mod-crop", type=click.IntRange(1), default=None,
              help="Crop HR sides to a multiple of this, in pixels. Set 8 for the published OST300 figures.  [default: the "
                   "scale]")  # fmt: skip
@click.option("--round-y", is_flag=True, help="Round Y to 8 bits, as MATLAB and many published tables do. BasicSR does not.")
@trust_option
@click.option("--run", "name", default=None, help="Name of the run below HOME/runs.  [default: evaluate-TEST]")
@home_option
@device_option
@click.option("--json", "json_file", type=click.Path(path_type=Path, allow_dash=True), is_flag=False, flag_value="-",
              default=None, metavar="[FILE]",
              help="Print JSON, or write it to FILE: an object, or a list if several weights are given.")  # fmt: skip
def evaluate(weights: tuple[str, ...], test: str, json_file: Path | None, name: str | None, home: str | None, device: str,
             trust: bool, **options: Any) -> None:  # fmt: skip
    """Measure SR networks and bicubic on a test set.

    Reports PSNR and SSIM on Y and RGB, and LPIPS. Bicubic upscaling is always included.

    Example: ddsr evaluate --weights bicubic --test B100/
    """
    config = protocol_of(options)
    store = open_store(home_of(home))
    names = {str(find_weights(store, weight)): weight for weight in weights}
    measured = steps().evaluate_networks(
        home_of(home), trust, test=test, weights=tuple(names), protocol=config, run=name, device=device
    )
    artifacts = {names.get(path, path): artifact for path, artifact in measured.items()}
    summaries = {name: json.loads((artifact.path / "summary.json").read_text()) for name, artifact in artifacts.items()}
    chosen = summaries[weights[0]] if len(weights) == 1 else [summaries[name] for name in weights]
    if json_file == Path("-"):
        click.echo(json.dumps(chosen, indent=2))
        return
    if json_file is not None:
        write_json(json_file, chosen)
    rows = [{"arch": summary["network"], "source": name, **summary["metrics"]} for name, summary in summaries.items()]
    steps().print_results(rows, title=f"SR networks on the test photos (x{config.scale})", origin="weights")
    for name, artifact in artifacts.items():
        click.echo(f"{name}: {summaries[name]['images']} images, listed in {artifact.path / 'per_image.parquet'}")


def protocol_of(options: dict[str, Any]) -> EvaluateConfig:
    """The config that results from the options of `evaluate`."""
    added = {*options["more_metrics"], *(name for name in ("lpips_vgg", "dists") if options[name])}
    switches = {**dict.fromkeys(sorted(added), True), **({"lpips": False} if options["no_lpips"] else {})}
    values = {name: options[name] for name in ("scale", "mod_crop", "round_y", "degradation")}
    return checked(EvaluateConfig, {**values, **switches})


@networks.command()
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--weights",
    required=True,
    shell_complete=complete_networks,
    help="Weights file, train_sr folder, or network of a run such as demo:edsr-small/distilled. Any file that "
    "spandrel opens is accepted.",
)
@click.option(
    "--tile",
    type=click.IntRange(0),
    default=512,
    show_default=True,
    help="Split larger images into tiles of this side, in input pixels. Lower it if memory runs out. 0: never split.",
)
@click.option(
    "--scale",
    type=click.IntRange(2),
    default=None,
    help="Upsampling factor that the weights must have; others are an error.",
)
@click.option("--existing", type=click.Choice(["refuse", "overwrite", "skip"]), default="refuse", show_default=True,
              help="What to do if an output file exists.")  # fmt: skip
@trust_option
@click.option("--run", "name", default=None, help="Name of the run below HOME/runs.  [default: upscale-IN]")
@home_option
@device_option
@json_option
def upscale(source: Path, output: Path, weights: str, tile: int, name: str | None, home: str | None, device: str,
            as_json: bool, **options: Any) -> None:  # fmt: skip
    """Enlarge an image or a folder with an SR network.

    The weights determine the upsampling factor. Transparency is preserved. The results are 8-bit PNG files. Files of a
    folder that cannot be enlarged, such as damaged ones or raw formats of cameras, are counted by reason; the exit code is
    then 3.

    Example: ddsr upscale small/ large/ --weights demo:edsr-small/distilled
    """
    place = home_of(home)
    fields = {"images": source, "output": output, "weights": find_weights(open_store(place), weights), "tile_px": tile}
    run, done = steps().upscale(place, device, **fields, run=name, **options)
    if as_json:
        skipped = {str(path): reason for path, reason in done.skipped.items()}
        written, kept = [str(path) for path in done.written], [str(path) for path in done.kept]
        result = {"network": done.network, "scale": done.scale, "written": written, "kept": kept, "skipped": skipped}
        click.echo(json.dumps({"run": run, **result}, indent=2))
    else:
        kept_text = f", {len(done.kept)} kept" if done.kept else ""
        click.echo(
            f"{done.network} x{done.scale}: {len(done.written)} written, {len(done.skipped)} skipped{kept_text}: {output}"
        )
        for line in skip_lines(done.skipped):
            click.echo(f"  {line}")
    if done.skipped:
        sys.exit(SOME_SKIPPED)


def skip_lines(skipped: Mapping[Path, str]) -> list[str]:
    """One line per reason: how many files were skipped for it, and the first of them.

    >>> skip_lines({Path("a.dng"): "unsupported: .dng", Path("b.dng"): "unsupported: .dng"})
    ['2 skipped, unsupported: .dng: a.dng, b.dng']
    """
    by_reason: dict[str, list[str]] = {}
    for path, reason in skipped.items():
        by_reason.setdefault(reason, []).append(click.format_filename(path))
    first = {reason: [*names[:SHOWN_SKIPS], *["…"] * (len(names) > SHOWN_SKIPS)] for reason, names in by_reason.items()}
    return [f"{len(names)} skipped, {reason}: {', '.join(first[reason])}" for reason, names in by_reason.items()]


@networks.command("export-sr")
@click.argument("weights", shell_complete=complete_networks)
@click.argument("output", metavar="OUT.onnx", type=click.Path(path_type=Path))
@trust_option
@click.option("--run", "name", default=None, help="Name of the run below HOME/runs.  [default: export-OUT]")
@home_option
@json_option
def export_sr(weights: str, output: Path, trust: bool, name: str | None, home: str | None, as_json: bool) -> None:
    """Export an SR network to ONNX.

    WEIGHTS is a train_sr folder, a weights file, or a network of a run such as demo:edsr-small/distilled. The ONNX file
    accepts images of any size; its output is compared with that of PyTorch. Programs that read PyTorch files need no export:
    weights.pth and weights.safetensors in the folder use the tensor names of the original implementations.

    Example: ddsr export-sr demo:edsr-small/distilled x4.onnx
    """
    place = home_of(home)
    file = find_weights(open_store(place), weights)
    done = steps().export_network(place, weights=file, output=output, trust=trust, run=name)
    network = done.network
    if as_json:
        largest = {f"{height}x{width}": difference for (height, width), difference in done.differences.items()}
        result = {"network": network.name, "scale": network.scale, "file": str(output), "largest_difference": largest}
        click.echo(json.dumps({"run": done.run, **result}, indent=2))
        return
    click.echo(f"{network.name} x{network.scale}: {output}")
    for (height, width), difference in done.differences.items():
        click.echo(f"  LR of {height}x{width} px: largest difference between onnxruntime and PyTorch {difference:.1e}")
