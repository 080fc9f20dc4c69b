"""The pipeline from Python, in a few functions; each of them is also ``ddsr_core.<name>``.

>>> import ddsr_core                                                              # doctest: +SKIP
>>> photos, tests = ddsr_core.demo_photos("photos")                               # doctest: +SKIP
>>> run = ddsr_core.distill(photos, test=tests, preset="demo", home="my-home")    # doctest: +SKIP
>>> images = ddsr_core.load_distilled(run.folder)                                 # doctest: +SKIP
>>> weights = ddsr_core.train(run.folder / "distilled", "edsr-small", home="my-home", iterations=2000)  # doctest: +SKIP
>>> ddsr_core.evaluate(weights, tests, home="my-home")["psnr_y"]                  # doctest: +SKIP
>>> ddsr_core.upscale("small.png", "large.png", weights)                          # doctest: +SKIP

Everything runs in this process, without Prefect. Results are kept in a home folder: repeating a call
reuses them, and an interrupted call continues.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddsr_core.config import Runtime, resolve_device
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.evaluation.evaluate import BICUBIC
from ddsr_core.experiments.names import ExperimentName
from ddsr_core.experiments.request import ExperimentRequest, run_experiment_plainly
from ddsr_core.imaging import demo_photos as bundled
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.image_sets import read_image_set
from ddsr_core.pipeline import run_folder, steps
from ddsr_core.pipeline.config import PipelineConfig, Preset, checked, load_config
from ddsr_core.pipeline.plain import plain_backend
from ddsr_core.pipeline.request import RunRequest
from ddsr_core.pipeline.run import run_plainly
from ddsr_core.pipeline.run_state import Outcome
from ddsr_core.pipeline.step_runs import EvaluateRequest, TrainRequest, run_evaluation, run_training
from ddsr_core.pipeline.steps import Crops
from ddsr_core.progress import ProgressFactory, silent
from ddsr_core.sr.upscale import Upscaled
from ddsr_core.sr.upscale import upscale as enlarge
from ddsr_core.storage.remote_store import open_store
from ddsr_core.storage.stage import require_whole

HOME = "ddsr-home"


@dataclass(frozen=True)
class DistilledImage:
    """One image of a distilled set.

    Attributes:
        pixels: ``uint8 (H, W, 3)``, RGB.
        label: its pseudo-label, 0 to k - 1.
        row: its row of ``metadata.jsonl``, such as ``psnr_bic`` and ``nearest_patch_id``.
    """

    pixels: np.ndarray
    label: int
    row: Mapping[str, Any]


def distill(
    images: str | Path,
    *,
    test: str | Path | None = None,
    preset: Preset = "demo",
    overrides: Iterable[str] = (),
    progress: ProgressFactory = silent,
    **options: Any,
) -> Outcome:
    """Distill a folder of photos, train SR networks on the result and on the sets to compare with, and measure them.

    Args:
        images: training photos: a folder, a Parquet file with an image column, or a glob pattern.
        test: test photos; None holds out one photo in ten.
        preset: values that the configuration starts from.
        overrides: single fields to change, such as ``"sample.count=140"`` or ``"sr.archs=[]"``.
        progress: how progress is shown.
        options: more fields of `ddsr_core.pipeline.request.RunRequest`: ``home``, ``run``, ``device``, ``runner``,
            ``workers``, or a complete ``config``.

    Returns:
        The run folder, its report, and one row per network and per stage.

    Raises:
        ConfigError: an unknown field, or a value out of range.
        InputError: photos or weights that cannot be used.
        StorageError: the home cannot be written.
    """
    named = {"images": images, "test": test, "preset": preset, "overrides": tuple(overrides)}
    return run_plainly(checked(RunRequest, {**named, **options}), progress)


def reproduce(
    experiment: ExperimentName,
    images: str | Path,
    test: str | Path,
    *,
    seeds: int = 3,
    progress: ProgressFactory = silent,
    **options: Any,
) -> dict[str, Any]:
    """Fill one of the paper's tables, or measure what each part of the method contributes.

    Args:
        experiment: ``"table1"``, ``"table2"``, ``"table3"``, ``"ablation"`` and others.
        seeds: number of seeds, counted from 0.
        options: more fields of `ddsr_core.experiments.request.ExperimentRequest`.

    Returns:
        ``about``, ``bicubic`` and ``cells``, one per network; the tables are in the run folder.
    """
    named = {"experiment": experiment, "images": images, "test": test, "seeds": seeds}
    command = f"ddsr_core.reproduce({experiment!r}, …)"
    return run_experiment_plainly(checked(ExperimentRequest, {"command": command, **named, **options}), progress)


def train(
    data: str | Path,
    arch: str = "edsr-small",
    *,
    crops: Crops | None = None,
    home: str | Path = HOME,
    run: str | None = None,
    device: str = "auto",
    progress: ProgressFactory = silent,
    **recipe: Any,
) -> Path:
    """Train one SR network on a folder of images.

    Args:
        data: a folder of images, a distilled set, a patches artifact, or Parquet.
        arch: a name in `ddsr_core.sr.architectures.ARCHITECTURES`, or ``"module:Class"``.
        crops: which crops of the images to train on; None trains on the images themselves.
        run: name of the run below ``home/runs``; None: network and data.
        recipe: fields of `ddsr_core.sr.config.TrainSRConfig`, such as ``iterations=2000``.

    Returns:
        A folder with ``weights.safetensors`` and ``weights.pth``.

    Raises:
        ConfigError: an unknown architecture or field.
        InputError: no images.
    """
    cut = crops or Crops()
    named = {"data": data, "arch": arch, "training_set": cut.source, "count": cut.budget, "patch_px": cut.patch_px}
    more = {"embeddings": cut.embeddings, "overrides": tuple(_overrides(recipe)), "home": home, "device": device, "run": run}
    request = checked(TrainRequest, {**named, **more})
    store = open_store(home)
    return run_training(request, store, plain_backend(request, store, progress)).weights.path


def evaluate(
    weights: str | Path | None,
    test: str | Path,
    *,
    home: str | Path = HOME,
    run: str | None = None,
    device: str = "auto",
    progress: ProgressFactory = silent,
    **protocol: Any,
) -> dict[str, float | None]:
    """Measure an SR network on test photos, on Y and RGB, as the field does.

    Args:
        weights: a weights file or a folder of `train`; None for bicubic upscaling.
        test: a folder of HR images, or one with ``HR/`` and ``LRx4/``.
        run: name of the run below ``home/runs``; None: ``evaluate-`` and the test set.
        protocol: fields of `ddsr_core.evaluation.evaluate.EvaluateConfig`, such as ``lpips=False``.

    Returns:
        ``psnr_y``, ``psnr_rgb`` in dB, ``ssim_y``, ``ssim_rgb`` and ``lpips``; None for what was not measured.

    Raises:
        InputError: no such weights or images.
    """
    name = BICUBIC if weights is None else str(weights)
    named = {"test": test, "weights": () if weights is None else (name,), "protocol": checked(EvaluateConfig, protocol)}
    request = checked(EvaluateRequest, {**named, "home": home, "device": device, "run": run})
    store = open_store(home)
    measured = run_evaluation(request, store, plain_backend(request, store, progress))
    return dict(measured[name].manifest.counts["metrics"])


def upscale(
    inputs: str | Path, output: str | Path, weights: str | Path, *, tile_px: int = 512, device: str = "auto"
) -> Upscaled:
    """Enlarge an image, or a folder of images, to PNG files.

    Args:
        weights: a folder of `train`, or any weights file that spandrel reads.
        tile_px: side of the tiles that large images are cut into; 0 for never.

    Raises:
        InputError: no such image or weights, or the output exists already.
    """
    return enlarge(Path(inputs), Path(output), Path(weights), tile_px=tile_px, runtime=Runtime(resolve_device(device)))


def search(query: str | Path, run: str, *, home: str | Path = HOME, count: int = 12) -> list[dict[str, Any]]:
    """The accepted patches of a run that are nearest to a text or an image.

    Args:
        query: a text (str), which needs open_clip embeddings, or an image file (Path).

    Returns:
        One row per patch, nearest first: ``patch_id``, ``photo``, ``pseudo_label``, ``cosine``.

    Raises:
        InputError: no such run, or it has no clusters yet.
        ConfigError: ``query`` is a text, but the feature network of the run cannot embed text.
    """
    return steps.search_run(open_store(home), run, query, count)


def load_distilled(folder: str | Path) -> list[DistilledImage]:
    """The images of a distilled set.

    Args:
        folder: a run folder, its ``distilled/``, or ``nightly/<name>/current``.

    Raises:
        InputError: there is no distilled set.
    """
    folder = Path(folder)
    root = folder / "distilled" if (folder / "distilled").is_dir() else folder
    require_whole(root)
    rows = read_image_set(root)
    return [DistilledImage(read_rgb(root / row["file_name"]), int(row["pseudo_label"]), row) for row in rows]


def preset_config(preset: Preset = "demo", overrides: Iterable[str] = ()) -> PipelineConfig:
    """The full configuration of a preset, to inspect or to pass to `distill`.

    Raises:
        ConfigError: an unknown preset or field, or a value out of range.
    """
    return load_config(preset, overrides=overrides)


def list_runs(home: str | Path = HOME) -> list[dict[str, Any]]:
    """The runs of a home, oldest first: name, status, preset, stages."""
    return run_folder.list_runs(open_store(home))


def demo_photos(folder: str | Path) -> tuple[Path, Path]:
    """Write the photos of ``ddsr demo`` into a folder.

    Returns:
        Folders of training and test photos.
    """
    return bundled.write_demo_photos(Path(folder))


def _overrides(fields: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """``field=value`` texts of nested fields."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _overrides(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={'null' if value is None else json.dumps(value)}"
