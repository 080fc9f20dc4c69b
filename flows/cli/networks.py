"""Commands on one SR network: train-sr, evaluate, upscale, export-sr."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from ddsr_core.baselines.names import TRAINING_SETS
from ddsr_core.metrics.spec import METRICS
from ddsr_core.reporters import ReporterName
from ddsr_core.sr.config import Degradation
from flows.cli.options import Group, device_option, home_option, json_option

trust_option = click.option(
    "--trust", is_flag=True, help="Import the network of your own (module:Class) that a weights file names."
)


@click.group(cls=Group, title="SR networks")
def networks() -> None:
    """Commands on one SR network."""


@networks.command("train-sr")
@click.option("--data", required=True, help="Folder of HR images, image set, patches artifact, or Parquet.")
@click.option("--arch", default="edsr-small", show_default=True,
              help="Network, or module:Class of your own. An unknown name lists all networks.")  # fmt: skip
@click.option("--training-set", "--source", "training_set", type=click.Choice(list(TRAINING_SETS)), default="full",
              show_default=True,
              help="full trains on DATA as it is. gsdd, base and distilled do too, and check that DATA is such a set. The "
                   "others cut crops out of DATA.")  # fmt: skip
@click.option("--count", "--budget", "count", type=click.IntRange(1), default=70, show_default=True,
              help="Number of crops, for training sets that are cut out of DATA.")  # fmt: skip
@click.option("--patch-px", type=click.IntRange(16), default=64, show_default=True,
              help="Height and width of these crops in pixels.")  # fmt: skip
@click.option("--embeddings", type=click.Choice(["vgg16", "open_clip"]), default="vgg16", show_default=True,
              help="Features that k-center and hdc compare crops by.")  # fmt: skip
@click.option("--iterations", type=click.IntRange(1), default=2000, show_default=True, help="Optimizer steps.")
@click.option("--scale", type=click.Choice(["2", "3", "4"]), default="4", show_default=True, help="Upsampling factor.")
@click.option("--degradation", type=click.Choice(get_args(Degradation)), default="bicubic", show_default=True,
              help="How LR images are made. real-esrgan: random blur, noise and JPEG, for unknown photos.")  # fmt: skip
@click.option("--init", type=click.Path(path_type=Path), default=None,
              help="Start from these weights: a train_sr folder, or a file of the same network and scale.")  # fmt: skip
@click.option("--test", type=click.Path(path_type=Path), default=None,
              help="Photos to validate on during training. The best weights are kept beside the last ones.")  # fmt: skip
@click.option("--val-every", type=click.IntRange(1), default=None,
              help="Steps between validations. Default: a tenth of the iterations.")  # fmt: skip
@click.option("--val-metric", "val_metrics", multiple=True, type=click.Choice(list(METRICS)),
              help="Metric of the validation. May be repeated; the first one decides which weights are best. "
                   "Default: psnr_y, ssim_y.")  # fmt: skip
@click.option("--early-stop", type=click.IntRange(1), default=None,
              help="Stop after this many validations without a new best.")  # fmt: skip
@click.option("--report-to", type=click.Choice(get_args(ReporterName)), default=None,
              help="Show training curves in this program. Files go to HOME/tracking.")  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE",
              help="Override a field of the recipe, such as batch_size=8. May be repeated.")  # fmt: skip
@home_option
@device_option
@json_option
def train_sr(**options: Any) -> None:
    """Train one SR network on a folder of images.

    Example: ddsr train-sr --data ddsr-home/runs/demo/distilled --arch edsr-small --iterations 5000
    """
    if options["test"] is None and any(options[name] for name in ("val_every", "val_metrics", "early_stop")):
        raise click.UsageError("--val-every, --val-metric and --early-stop need --test.")
    from flows.cli import network_runs as runs  # imports torch

    chosen = {"every": options["val_every"], "metrics": options["val_metrics"], "early_stop": options["early_stop"]}
    training = runs.Training(
        data=options["data"],
        crops=runs.Crops(options["training_set"], options["count"], options["patch_px"], options["embeddings"]),
        values={
            "arch": options["arch"], "iterations": options["iterations"], "scale": int(options["scale"]),
            "degradation": options["degradation"],
        },
        overrides=options["overrides"], test=options["test"], init=options["init"], report_to=options["report_to"],
        validation={name: value for name, value in chosen.items() if value},
    )  # fmt: skip
    result = runs.train(training, options["home"], options["device"])
    click.echo(runs.as_json(result) if options["as_json"] else "\n".join(runs.weights_lines(result)))


@networks.command()
@click.option("--weights", required=True, multiple=True, help="Weights file, train_sr folder, or bicubic. May be repeated.")
@click.option("--test", required=True, help="Folder of HR images, or of HR-LR pairs (HR/ and LRx4/, …).")
@click.option("--json", "json_file", type=click.Path(path_type=Path), default=None,
              help="Write the metrics to this file: an object, or a list if several weights are given.")  # fmt: skip
@click.option("--scale", type=click.IntRange(2, 8), default=4, show_default=True, help="Upsampling factor of the networks.")
@click.option("--mod-crop", type=click.IntRange(1), default=None,
              help="Crop HR images to a multiple of it. Default: the scale. Set 8 for published OST300.")  # fmt: skip
@click.option("--degradation", type=click.Choice(get_args(Degradation)), default="bicubic", show_default=True,
              help="How LR images are made that are not given, as in train-sr.")  # fmt: skip
@click.option("--metric", "more_metrics", multiple=True, type=click.Choice(list(METRICS)),
              help="Measure this metric too. May be repeated.")  # fmt: skip
@click.option("--no-lpips", is_flag=True, help="Do not measure LPIPS, which takes most of the time on a CPU.")
@click.option("--lpips-vgg", is_flag=True, hidden=True, help="The same as --metric lpips_vgg.")
@click.option("--dists", is_flag=True, hidden=True, help="The same as --metric dists.")
@click.option("--round-y", is_flag=True, help="Round Y to 8 bits, as MATLAB and many published tables do. BasicSR does not.")
@trust_option
@home_option
@device_option
def evaluate(**options: Any) -> None:
    """Measure SR networks and bicubic on a test set.

    Reports PSNR and SSIM on Y and RGB, and LPIPS.

    Example: ddsr evaluate --weights bicubic --test B100/
    """
    added = {*options["more_metrics"], *(name for name in ("lpips_vgg", "dists") if options[name])}
    switches = {**dict.fromkeys(sorted(added), True), **({"lpips": False} if options["no_lpips"] else {})}
    values = {name: options[name] for name in ("scale", "mod_crop", "round_y", "degradation", "trust")}
    from flows.cli import network_runs as runs  # imports torch

    test, home, device = Path(options["test"]), options["home"], options["device"]
    runs.evaluate(options["weights"], test, {**values, **switches}, options["json_file"], home, device)


@networks.command()
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--weights",
    required=True,
    type=click.Path(path_type=Path),
    help="Weights file or train_sr folder. Any file that spandrel opens will do.",
)
@click.option(
    "--tile",
    type=click.IntRange(0),
    default=512,
    show_default=True,
    help="Process larger images in tiles of this side, in input pixels. Lower it if memory runs out. 0: never.",
)
@click.option("--scale", type=click.IntRange(2), default=None, help="Fail if the weights have another upsampling factor.")
@click.option("--existing", type=click.Choice(["refuse", "overwrite", "skip"]), default="refuse", show_default=True,
              help="What to do with output files that exist.")  # fmt: skip
@trust_option
@device_option
def upscale(source: Path, output: Path, weights: Path, tile: int, scale: int | None, existing: Any, trust: bool,
            device: str) -> None:  # fmt: skip
    """Enlarge an image or a folder with an SR network.

    The upsampling factor is that of the weights. Transparency is kept. The results are 8-bit PNG files.

    Example: ddsr upscale small/ large/ --weights ddsr-home/…/weights.safetensors
    """
    from flows.cli import network_runs as runs  # imports torch

    done = runs.enlarge(source, output, weights, device, scale=scale, tile_px=tile, existing=existing, trust=trust)
    kept = f", {len(done.kept)} kept" if done.kept else ""
    click.echo(f"{done.network} x{done.scale}: {len(done.written)} written, {len(done.skipped)} skipped{kept}: {output}")
    for path, reason in done.skipped.items():
        click.echo(f"  {path}: {reason}")


@networks.command("export-sr")
@click.argument("weights", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT.onnx", type=click.Path(path_type=Path))
@trust_option
def export_sr(weights: Path, output: Path, trust: bool) -> None:
    """Export an SR network to ONNX.

    WEIGHTS is a train_sr folder or a weights file. The ONNX file takes images of any size; its output is compared with
    that of PyTorch. Programs that open PyTorch files need no export: weights.pth and weights.safetensors in the folder
    have the tensor names of the networks' authors.

    Example: ddsr export-sr ddsr-home/artifacts/train_sr/KEY x4.onnx
    """
    from flows.cli import network_runs as runs  # imports torch

    runs.export(weights, output, trust)
