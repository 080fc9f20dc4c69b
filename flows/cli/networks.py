"""Commands on one SR network: train-sr, evaluate, upscale, export-sr."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import click

from flows.cli.options import Group, device_option, home_option, json_option
from flows.cli.running import home_of


@click.group(cls=Group)
def networks() -> None:
    """Commands on one SR network."""


class SourceType(click.ParamType):
    """A `ddsr_core.baselines.names.TrainingSetName`."""

    name = "source"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join(self.names())}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value not in self.names():
            self.fail(f"{value!r} is not one of {', '.join(self.names())}.", param, ctx)
        return value

    @staticmethod
    def names() -> tuple[str, ...]:
        from ddsr_core.baselines.names import TrainingSetName

        return get_args(TrainingSetName)


@networks.command("train-sr")
@click.option("--data", required=True, help="folder of HR images, an image set, a patches artifact, or Parquet")
@click.option("--arch", default="edsr-small", show_default=True, help="network; an unknown name lists them all")
@click.option("--source", type=SourceType(), default="full", show_default=True,
              help="random, threshold, k-center, hdc, loss-ranked and full-thresholded cut crops out of DATA; "
                   "the others train on DATA as it is")  # fmt: skip
@click.option("--budget", type=click.IntRange(1), default=70, show_default=True, help="crops that are chosen")
@click.option("--patch-px", type=click.IntRange(16), default=64, show_default=True, help="size of those crops")
@click.option("--embeddings", type=click.Choice(["vgg16", "open_clip"]), default="vgg16", show_default=True,
              help="features that k-center and hdc compare crops by")  # fmt: skip
@click.option("--iterations", type=click.IntRange(1), default=2000, show_default=True, help="optimizer steps")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="a field of the recipe, e.g. batch_size=8")
@home_option
@device_option
@json_option
def train_sr(data: str, arch: str, source: Any, budget: int, patch_px: int, embeddings: str, iterations: int,
             overrides: tuple[str, ...], home: str | None, device: str, as_json: bool) -> None:  # fmt: skip
    """Train one SR network on any folder of images.

    Example: ddsr train-sr --data ddsr-home/runs/demo/distilled --arch edsr-small --iterations 5000
    """
    from ddsr_core.imaging.photos import photo_source
    from ddsr_core.pipeline.steps import Crops
    from ddsr_core.storage.remote_store import open_store
    from flows.cli.single_steps import train_one

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


@networks.command()
@click.option("--weights", required=True, multiple=True, help="weights file, train_sr folder, or bicubic; may be repeated")
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
    from ddsr_core.evaluation.evaluate import EvaluateConfig
    from ddsr_core.pipeline.steps import with_overrides
    from ddsr_core.storage.files import write_json
    from ddsr_core.storage.remote_store import open_store
    from flows.cli.console import print_results
    from flows.cli.single_steps import evaluate_networks

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


@networks.command()
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
    from ddsr_core.sr.upscale import upscale as enlarge
    from flows.cli.console import progress_for

    runtime = Runtime(device=resolve_device(device), progress=progress_for())
    done = enlarge(source, output, weights, scale=scale, tile_px=tile, existing=existing, runtime=runtime)  # type: ignore[arg-type]
    kept = f", {len(done.kept)} kept" if done.kept else ""
    click.echo(f"{done.network} x{done.scale}: {len(done.written)} written, {len(done.skipped)} skipped{kept}: {output}")
    for path, reason in done.skipped.items():
        click.echo(f"  {path}: {reason}")


@networks.command("export-sr")
@click.argument("weights", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT.onnx", type=click.Path(path_type=Path))
def export_sr(weights: Path, output: Path) -> None:
    """Write an SR network as ONNX, for images of any size, and compare its images with PyTorch's.

    WEIGHTS is a train_sr folder or a weights file. For programs that read PyTorch's files nothing is to be exported:
    weights.pth and weights.safetensors in the folder have the names of the networks' authors.

    Example: ddsr export-sr ddsr-home/artifacts/train_sr/KEY x4.onnx
    """
    from ddsr_core.pipeline.steps import export_network

    network, differences = export_network(weights, output)
    click.echo(f"{network.name} x{network.scale}: {output}")
    for (height, width), difference in differences.items():
        click.echo(f"  LR of {height}x{width} px: largest difference between onnxruntime and PyTorch {difference:.1e}")
