"""Single steps as the command line starts them: on this machine, with progress on the terminal."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from ddsr_core.config import Runtime, resolve_device
from ddsr_core.evaluation.evaluate import BICUBIC
from ddsr_core.pipeline.config import checked
from ddsr_core.pipeline.output_runs import (
    Exported,
    ExportedNetwork,
    ExportRequest,
    NetworkExportRequest,
    UpscaleRequest,
    run_export,
    run_network_export,
    run_upscale,
)
from ddsr_core.pipeline.plain import plain_backend
from ddsr_core.pipeline.step_runs import EvaluateRequest, Trained, TrainRequest, run_evaluation, run_training
from ddsr_core.pipeline.steps import Crops, search_run, with_overrides
from ddsr_core.pretrain.config import PretrainConfig
from ddsr_core.pretrain.photographs import fetch_photographs
from ddsr_core.pretrain.run import run as pretrain
from ddsr_core.reporters import ReporterName, Tracking, tracked
from ddsr_core.sr.plan import plan_of
from ddsr_core.sr.upscale import Upscaled
from ddsr_core.sr.weights import named_class
from ddsr_core.storage.files import storage_errors
from ddsr_core.storage.remote_store import open_store
from ddsr_core.storage.stage import RESUME, Artifact
from flows.cli.console import print_results, progress_for

__all__ = [
    "Crops", "evaluate_networks", "export_model", "export_network", "pretrain_base", "print_results",
    "search_run", "train_one", "upscale", "with_overrides",
]  # fmt: skip


def train_one(home: str, **fields: Any) -> Trained:
    """Train one network on a folder of images."""
    request = checked(TrainRequest, {"home": home, **fields})
    store, recipe = open_store(home), request.recipe()
    trained = run_training(request, store, plain_backend(request, store, progress_for()))
    if trained.cached and request.report_to:
        click.echo(f"ddsr: nothing to report to {request.report_to}: the network is already in the cache", err=True)
    crop = trained.weights.manifest.config["lr_patch_px"]
    if crop is not None and recipe.lr_patch_px is None:
        text = f"LR crops of {crop} px: the images are smaller than the published {plan_of(recipe).lr_patch_px} px"
        click.echo(f"ddsr: {text}", err=True)
    return trained


def evaluate_networks(home: str, trust: bool, **fields: Any) -> Mapping[str, Artifact]:
    """Measure weights files and ``train_sr`` folders, by the names given. Bicubic always comes first.

    Args:
        trust: allow files to import the user's own networks (``module:Class``).
    """
    request = checked(EvaluateRequest, {"home": home, **fields})
    if trust:
        classes = (named_class(Path(name).expanduser()) for name in request.weights if name != BICUBIC)
        protocol = request.protocol.model_copy(update={"trust": tuple(name for name in classes if name)})
        request = request.model_copy(update={"protocol": protocol})
    store = open_store(home)
    return run_evaluation(request, store, plain_backend(request, store, progress_for()))


def upscale(home: str, device: str, **fields: Any) -> tuple[str, Upscaled]:
    """Enlarge an image or a folder of images; returns the name of the run and what was written."""
    request = checked(UpscaleRequest, fields)
    return run_upscale(request, open_store(home), Runtime(device=resolve_device(device), progress=progress_for()))


def export_model(home: str, **fields: Any) -> Exported:
    """Export the fine-tuned model of a run, or an adapter's folder with its base."""
    return run_export(checked(ExportRequest, fields), open_store(home))


def export_network(home: str, **fields: Any) -> ExportedNetwork:
    """Write an SR network as ONNX."""
    return run_network_export(checked(NetworkExportRequest, fields), open_store(home))


def pretrain_base(photos: Path | None, out: Path, overrides: Iterable[str], report_to: ReporterName | None = None) -> Path:
    """Train a base model into the folder ``out``. Until it is done, ``out/resume`` holds the state to resume from.

    Args:
        report_to: program that shows the curves; its files go to ``out/tracking``.
    """
    config = with_overrides(PretrainConfig, {}, overrides)
    tracking = Tracking(to=report_to) if report_to else None
    runtime = Runtime(progress=progress_for(), reporter=tracked(tracking, out))
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if photos is None:
            photos = fetch_photographs(out / RESUME / "photos", runtime.progress)
        done = pretrain(config, photos=photos, out=out, runtime=runtime)
        shutil.rmtree(out / RESUME)
    for reason, count in done.counts["skipped"].items():
        click.echo(f"ddsr: {count} photos skipped: {reason}", err=True)
    return out
