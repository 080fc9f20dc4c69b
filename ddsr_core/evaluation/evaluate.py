"""Stage `evaluate`: an SR network, or plain bicubic, on a test set: PSNR and SSIM on Y and RGB, LPIPS, DISTS.

The field's protocol: the HR image is cut to a multiple of ``mod_crop``, the LR image is made from it by
MATLAB's bicubic reduction and rounded to 8 bits (or lies beside it), the network sees the whole image in
float32, and the metrics of `ddsr_core.metrics.psnr_ssim` are averaged over images. Bicubic x4 on B100 (100 photos)
gives 25.96 dB and .6682 on Y, .6674 with Y rounded (`ddsr_core.metrics.psnr_ssim`).
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from ddsr_core.config import Runtime, StageConfig, resolve_device
from ddsr_core.errors import InputError
from ddsr_core.evaluation.test_sets import HrImage, find_pairs
from ddsr_core.imaging.images import save_png, to_uint8
from ddsr_core.storage.files import write_atomically, write_json
from ddsr_core.storage.stage import RESUME, Stage, StageResult

if TYPE_CHECKING:
    import torch

    from ddsr_core.evaluation.evaluator import Enlarged, Evaluator

    #: float32 (B, 3, h, w) in [0, 1] to (B, 3, h * scale, w * scale)
    Network = Callable[[torch.Tensor], torch.Tensor]

METRICS = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "lpips")
#: Measured where asked for.
MORE_METRICS = ("lpips_vgg", "dists")
BICUBIC = "bicubic"
#: LPIPS and the SSIM window need this much of the HR image.
MIN_SIDE_PX = 32


class EvaluateConfig(StageConfig):
    """How a network is measured."""

    scale: int = Field(default=4, ge=2, le=8, description="enlargement; the weights must have the same")
    mod_crop: int = Field(default=4, ge=1, le=64, description="HR sides are cut to a multiple of it; OST300: 8")
    lpips: bool = Field(default=True, description="measure LPIPS (v0.1, AlexNet) too")
    lpips_vgg: bool = Field(default=False, description="measure LPIPS (v0.1, VGG16) too")
    dists: bool = Field(default=False, description="measure DISTS too; its weights must be installed")
    round_y: bool = Field(default=False, description="round Y to 8 bits as MATLAB does; BasicSR does not")
    tile_px: int = Field(default=512, ge=0, description="tile side for LR images of more than its square; 0: never")
    tile_overlap_px: int = Field(default=48, ge=0, description="LR pixels of a tile that only give context")
    crops: int = Field(default=4, ge=0, le=64, description="test images to store a close-up of")
    crop_px: int = Field(default=128, ge=MIN_SIDE_PX, description="side of a close-up in HR pixels")

    @model_validator(mode="after")
    def _whole_lr_pixels(self) -> EvaluateConfig:
        if self.mod_crop % self.scale:
            raise ValueError(f"mod_crop ({self.mod_crop}) must be a multiple of scale ({self.scale})")
        if self.tile_px and self.tile_overlap_px * 2 >= self.tile_px:
            raise ValueError(f"tile_px ({self.tile_px}) must be more than twice tile_overlap_px ({self.tile_overlap_px})")
        return self


@dataclass(frozen=True)
class ImageScores:
    """One row of ``per_image.parquet``. PSNR in dB (inf where SR equals HR); None: not measured.

    ``height`` and ``width`` are those of the HR image that was measured, before its border is cut off.
    """

    image: str
    height: int
    width: int
    psnr_y: float
    ssim_y: float
    psnr_rgb: float
    ssim_rgb: float
    lpips: float | None
    lpips_vgg: float | None = None
    dists: float | None = None


def run(config: EvaluateConfig, *, test: Path, weights: Path | None = None, out: Path, runtime: Runtime) -> StageResult:
    """Measure ``weights`` (a ``train_sr`` folder or a weights file; None: bicubic) on the images of ``test``.

    ``test`` is any photo source, or a folder of pairs (`find_pairs`). Continues image by image after a kill. Images
    that cannot be read or are too small are counted as skipped.

    Raises:
        InputError: no image could be measured, pairs do not match, or the weights have another scale or cannot be read.
        MissingWeightsError: LPIPS or DISTS is wanted and its weights are not installed.
    """
    device = resolve_device(runtime.device)
    network, name = _load(config, weights, device)
    images = find_pairs(test, config.scale, config.mod_crop)
    files = [out / RESUME / f"{index:06d}.json" for index in range(len(images))]
    missing = [index for index, file in enumerate(files) if not file.is_file()]
    if missing:
        from ddsr_core.evaluation.evaluator import Evaluator, overlapped, reference_features

        evaluator = Evaluator(network, config, device, reference_features(test))
        closeups = {index: out / "crops" / f"{index:06d}" for index in _spread(len(images), config.crops)}
        done = len(images) - len(missing)
        with runtime.progress(f"Evaluating {name}", total=len(images), unit="photos", done=done) as bar:
            jobs = ((images[index], closeups.get(index)) for index in missing)
            scored = overlapped(jobs, partial(_enlarge_or_skip, evaluator), partial(_score, evaluator), device)
            for index, row in zip(missing, scored, strict=True):
                write_atomically(files[index], json.dumps(row).encode())  # no write_json: a PSNR may be inf
                bar.advance()
    rows = [json.loads(file.read_bytes()) for file in files]
    summary = _summarize(name, config, rows, test, lr_given=images[0].lr is not None)
    _write_rows(out / "per_image.parquet", [row["scores"] for row in rows if "scores" in row])
    write_json(out / "summary.json", summary)
    return StageResult({key: summary[key] for key in ("network", "scale", "images", "identical", "metrics")}
                       | {"skipped": len(summary["skipped"])})  # fmt: skip


STAGE = Stage("evaluate", version=2, run=run, config=EvaluateConfig, section="III", on_gpu=True)


def evaluate_network(
    network: Network,
    images: Iterable[tuple[str, np.ndarray]],
    config: EvaluateConfig | None = None,
    *,
    device: str = "cpu",
) -> list[ImageScores]:
    """Measure a network in memory.

    Args:
        network: float32 (B, 3, h, w) in [0, 1] to (B, 3, h * scale, w * scale), on ``device``.
        images: names and HR images, uint8 (H, W, 3); LR images are made from them.
        config: `EvaluateConfig` with its defaults where None.

    Raises:
        InputError: an image is too small to measure.
    """
    from ddsr_core.evaluation.evaluator import Evaluator, overlapped

    evaluator = Evaluator(network, config or EvaluateConfig(), device)

    def enlarge(image: tuple[str, np.ndarray]) -> Enlarged:
        name, hr = image
        return evaluator.enlarge(name, evaluator.cut(name, hr))

    return list(overlapped(images, enlarge, evaluator.score, device))


def mean_scores(scores: Iterable[ImageScores]) -> dict[str, float | None]:
    """Mean of each metric over images; infinite PSNR is left out (`mean_psnr`). None: no value.

    Of `MORE_METRICS` those that were measured.
    """
    from ddsr_core.metrics.psnr_ssim import mean_psnr

    rows = list(scores)
    means: dict[str, float | None] = {}
    for metric in (*METRICS, *MORE_METRICS):
        values = [value for row in rows if (value := getattr(row, metric)) is not None]
        if values or metric in METRICS:
            means[metric] = mean_psnr(values) if metric.startswith("psnr") else _mean(values)
    return means


def _enlarge_or_skip(evaluator: Evaluator, job: tuple[HrImage, Path | None]) -> tuple[Enlarged | InputError, Path | None]:
    image, closeup = job
    try:
        hr, lr = evaluator.read(image)
    except InputError as error:
        return InputError(error.what, where=image.hr.name), closeup
    return evaluator.enlarge(image.hr.name, hr, lr), closeup


def _score(evaluator: Evaluator, job: tuple[Enlarged | InputError, Path | None]) -> dict[str, Any]:
    """JSON row ``{"scores", "closeup"}`` of an image, or ``{"skipped": {"file", "reason"}}``.

    With a path for a close-up, it goes to ``<path>_hr.png``, ``_bicubic.png`` and ``_sr.png``.
    """
    image, closeup = job
    if isinstance(image, InputError):
        return {"skipped": {"file": image.where, "reason": image.what}}
    row: dict[str, Any] = {"scores": asdict(evaluator.score(image))}
    if closeup is not None:
        row["closeup"] = _store_closeup(closeup, image, evaluator.config) | {"image": image.name}
    return row


def _store_closeup(stem: Path, image: Enlarged, config: EvaluateConfig) -> dict[str, Any]:
    """Cut out the square where bicubic loses most: the same for every network."""
    from ddsr_core.imaging.bicubic import upsample

    bicubic = to_uint8(upsample(image.lr, config.scale))[0]
    top, left, side = _hardest_square(image.hr, bicubic, config.crop_px)
    entry: dict[str, Any] = {"y": top, "x": left, "px": side}
    for kind, pixels in {"hr": image.hr, "bicubic": bicubic, "sr": to_uint8(image.sr)[0]}.items():
        path = stem.with_name(f"{stem.name}_{kind}.png")
        save_png(path, pixels[top : top + side, left : left + side])
        entry[kind] = f"{path.parent.name}/{path.name}"
    return entry


def _load(config: EvaluateConfig, weights: Path | None, device: str) -> tuple[Network, str]:
    if weights is None:
        from ddsr_core.imaging.bicubic import upsample

        return lambda lr: upsample(lr, config.scale), BICUBIC
    from ddsr_core.sr.weights import load_network

    network, scale, name = load_network(weights)
    if scale != config.scale:
        raise InputError(
            f"the weights enlarge x{scale}, the evaluation is for x{config.scale}",
            where=weights,
            fix=f"set evaluate.scale={scale}, or use x{config.scale} weights",
        )
    return network.to(device).eval(), name


def _hardest_square(hr: np.ndarray, bicubic: np.ndarray, side: int) -> tuple[int, int, int]:
    """Top, left and side of the square with the largest squared error of bicubic."""
    side = min(side, *hr.shape[:2])
    error = np.square(hr.astype(np.int64) - bicubic).sum(2)
    total = np.pad(error, ((1, 0), (1, 0))).cumsum(0).cumsum(1)  # [y, x]: sum over rows < y, columns < x
    sums = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    top, left = np.unravel_index(sums.argmax(), sums.shape)
    return int(top), int(left), side


def _spread(count: int, wanted: int) -> frozenset[int]:
    """``wanted`` indices spread evenly over ``count``."""
    wanted = min(count, wanted)
    return frozenset((2 * i + 1) * count // (2 * wanted) for i in range(wanted))


def _summarize(name: str, config: EvaluateConfig, rows: list[dict[str, Any]], test: Path, lr_given: bool) -> dict[str, Any]:
    scores = [ImageScores(**row["scores"]) for row in rows if "scores" in row]
    skipped = [row["skipped"] for row in rows if "skipped" in row]
    if not scores:
        first = skipped[0]
        raise InputError(
            f"none of {len(skipped)} test images could be measured; {first['file']}: {first['reason']}",
            where=test,
            fix=f"name a folder of readable HR images with sides of at least {MIN_SIDE_PX} px",
        )
    return {
        "network": name,
        "scale": config.scale,
        "crop_border_px": config.scale,
        "mod_crop": config.mod_crop,
        "y": "rounded" if config.round_y else "not rounded",
        "lr": "given" if lr_given else "made from HR",
        "metrics": mean_scores(scores),
        "images": len(scores),
        "identical": sum(math.isinf(row.psnr_rgb) for row in scores),
        "skipped": skipped,
        "crops": [row["closeup"] for row in rows if "closeup" in row],
    }


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("image", pa.string()),
            ("height", pa.int32()),
            ("width", pa.int32()),
            *((metric, pa.float64()) for metric in (*METRICS, *MORE_METRICS)),
        ]
    )
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer)
    write_atomically(path, buffer.getvalue())


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
