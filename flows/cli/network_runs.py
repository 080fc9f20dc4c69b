"""What the commands on one SR network do, apart from their options: this module imports torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ddsr_core.config import Runtime, resolve_device
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.evaluation.evaluate import BICUBIC
from ddsr_core.imaging.photos import photo_source
from ddsr_core.metrics.spec import METRICS
from ddsr_core.pipeline import steps
from ddsr_core.pipeline.home import home_of
from ddsr_core.pipeline.plain import plain_backend
from ddsr_core.pipeline.request import Execution
from ddsr_core.pipeline.stages import Backend
from ddsr_core.pipeline.steps import Crops as Crops
from ddsr_core.reporters import OpenReporter, no_reporter, reporter_to
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.plan import plan_of
from ddsr_core.sr.upscale import Existing, Upscaled, upscale
from ddsr_core.sr.weights import named_class
from ddsr_core.storage.files import write_json
from ddsr_core.storage.remote_store import open_store
from ddsr_core.storage.stage import StageInput
from flows.cli.console import print_results, progress_for

#: Without --val-every a training with test photos is validated so often.
VALIDATIONS = 10


@dataclass(frozen=True)
class Training:
    """What `ddsr train-sr` was asked for.

    Attributes:
        data: images to train on, or to cut crops out of.
        crops: which crops.
        values: fields of the recipe.
        overrides: ``field=value`` texts over them.
        test: photos to validate on.
        validation: fields of `ddsr_core.sr.config.ValidationConfig` that are not the default.
        init: weights to start from.
        report_to: a `ddsr_core.reporters.ReporterName`.
    """

    data: str
    crops: Crops
    values: Mapping[str, Any]
    overrides: Sequence[str] = ()
    test: Path | None = None
    validation: Mapping[str, Any] | None = None
    init: Path | None = None
    report_to: str | None = None

    def recipe(self) -> TrainSRConfig:
        """The config of the training.

        Raises:
            ConfigError: unknown field, or a value out of range.
        """
        values = dict(self.values)
        if self.test is not None:
            every = max(1, values["iterations"] // VALIDATIONS)
            values["validation"] = {"every": every, **(self.validation or {})}
        recipe: TrainSRConfig = steps.with_overrides(TrainSRConfig, values, self.overrides)
        return recipe

    def inputs(self) -> dict[str, StageInput]:
        """Inputs of the stage besides the images.

        Raises:
            InputError: no such photos or weights.
        """
        test: dict[str, StageInput] = {"test": photo_source(self.test)} if self.test else {}
        return test | ({"init": steps.weights_source(self.init.expanduser())} if self.init else {})


def train(training: Training, home: str | None, device: str) -> dict[str, Any]:
    """Train one network. Returns where its weights are, and what was counted."""
    recipe, more = training.recipe(), training.inputs()
    reporter = reporter_to(training.report_to, Path(home_of(home)) / "tracking") if training.report_to else no_reporter
    backend = backend_at(home, device, reporter)
    weights, cached = steps.train_one(backend, recipe, photo_source(training.data), training.crops, more)
    crop = weights.manifest.config["lr_patch_px"]
    if crop is not None and recipe.lr_patch_px is None:
        text = f"LR crops of {crop} px: the images are smaller than the published {plan_of(recipe).lr_patch_px} px"
        click.echo(f"ddsr: {text}", err=True)
    if cached and training.report_to:
        click.echo(f"ddsr: nothing to report to {training.report_to}: the network was trained before", err=True)
    best = {"best_weights": weights.path / "best/weights.safetensors"} if recipe.validation else {}
    return {"weights": weights.path / "weights.safetensors", **best, "cached": cached, **weights.manifest.counts}


def evaluate(
    weights: Sequence[str], test: Path, values: Mapping[str, Any], json_file: Path | None, home: str | None, device: str
) -> None:
    """Measure networks and bicubic, and print a table. If ``values["trust"]``, files may import the networks they name."""
    classes = [named_class(Path(name).expanduser()) for name in weights if values["trust"] and name != BICUBIC]
    trusted = {"trust": tuple(name for name in classes if name)}
    config: EvaluateConfig = steps.with_overrides(EvaluateConfig, {**values, **trusted})
    artifacts = steps.evaluate_networks(backend_at(home, device), weights, test, config)
    summaries = {name: steps.summary_of(artifact) for name, artifact in artifacts.items()}
    if json_file is not None:
        write_json(json_file, summaries[weights[0]] if len(weights) == 1 else [summaries[name] for name in weights])
    rows = [{"arch": summary["network"], "source": name, **summary["metrics"]} for name, summary in summaries.items()]
    print_results(rows, title=f"SR networks on the test photos (x{config.scale})", origin="weights")
    for name, artifact in artifacts.items():
        click.echo(f"{name}: {summaries[name]['images']} images, listed in {artifact.path / 'per_image.parquet'}")


def enlarge(
    source: Path,
    output: Path,
    weights: Path,
    device: str,
    *,
    scale: int | None,
    tile_px: int,
    existing: Existing,
    trust: bool,
) -> Upscaled:
    """Enlarge images, with progress on the terminal."""
    runtime = Runtime(device=resolve_device(device), progress=progress_for())
    return upscale(source, output, weights, scale=scale, tile_px=tile_px, existing=existing, trust=trust, runtime=runtime)


def export(weights: Path, output: Path, trust: bool) -> None:
    """Write a network as ONNX, and print how far its images are from PyTorch's."""
    network, differences = steps.export_network(weights, output, trust)
    click.echo(f"{network.name} x{network.scale}: {output}")
    for (height, width), difference in differences.items():
        click.echo(f"  LR of {height}x{width} px: largest difference between onnxruntime and PyTorch {difference:.1e}")


def backend_at(home: str | None, device: str, reporter: OpenReporter = no_reporter) -> Backend:
    """Stages built on this machine into a home, with progress on the terminal."""
    store = open_store(home_of(home))
    store.check()
    return plain_backend(Execution(home=store.url, device=device), store, progress_for(), reporter=reporter)


def weights_lines(result: Mapping[str, Any]) -> list[str]:
    """What `ddsr train-sr` prints."""
    lines = [f"Weights: {result['weights']} (and .pth){' from cache' if result['cached'] else ''}"]
    if "best_weights" in result:
        metrics = ", ".join(f"{METRICS[name].label} {METRICS[name].text(value)}" for name, value in result["best"].items())
        lines.append(f"Best of the validation (step {result['best_step']}: {metrics}): {result['best_weights']}")
    return lines


def as_json(result: Mapping[str, Any]) -> str:
    """Indented JSON; paths as text."""
    return json.dumps(dict(result), indent=2, default=str)
