"""Single steps as the command line starts them: on this machine, with progress on the terminal."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ddsr_core.config import Runtime
from ddsr_core.pipeline import steps
from ddsr_core.pipeline.steps import ModelExport, search_run, with_overrides
from ddsr_core.pretrain.config import PretrainConfig
from ddsr_core.pretrain.photographs import fetch_photographs
from ddsr_core.pretrain.run import run as pretrain
from ddsr_core.storage.files import storage_errors
from ddsr_core.storage.stage import RESUME
from ddsr_core.storage.store import Store
from flows.cli.console import progress_for

__all__ = ["ModelExport", "export_model", "pretrain_base", "search_run", "with_overrides"]


def export_model(store: Store, source: str, out: Path, kind: Any, weights: Any, base: str | None, vae: str | None) -> Path:
    """Export the fine-tuned model of a run, or an adapter's folder with its base."""
    return steps.export_model(store, source, out, ModelExport(kind, weights, base, vae))


def pretrain_base(photos: Path | None, out: Path, overrides: Iterable[str]) -> Path:
    """Train a base model into the folder ``out``; until it is done, ``out/resume`` holds what is needed to continue."""
    config = with_overrides(PretrainConfig, {}, overrides)
    runtime = Runtime(progress=progress_for())
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if photos is None:
            photos = fetch_photographs(out / RESUME / "photos", runtime.progress)
        pretrain(config, photos=photos, out=out, runtime=runtime)
        shutil.rmtree(out / RESUME)
    return out
