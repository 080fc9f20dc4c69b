"""Stage `evaluate`: measure an SR network, or plain bicubic, on a test set.

The protocol of the literature: the HR image is cropped to a multiple of the scale, the LR image is made from it by
MATLAB's bicubic reduction and rounded to 8 bits (or is given), the network sees the whole image in float32, and every
metric is averaged over images. Bicubic x4 on B100 (100 photos) gives 25.96 dB and .6682 on Y. With ``round_y`` it gives the
published 25.96 dB and .6675 (`ddsr_core.evaluation.evaluator.published_bicubic_y`).
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddsr_core.config import Runtime, resolve_device
from ddsr_core.errors import ChangedInputError, InputError
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.evaluation.evaluator import Bicubic, Enlarged, Evaluator, Network, overlapped, reference_features
from ddsr_core.evaluation.scores import ImageScores, mean_scores
from ddsr_core.imaging.bicubic import upsample
from ddsr_core.imaging.images import save_png, to_uint8
from ddsr_core.imaging.test_sets import HrImage, pinned_pairs
from ddsr_core.metrics.spec import METRICS, MIN_SIDE_PX
from ddsr_core.sr.weights import load_network, weights_file
from ddsr_core.storage.files import sha256_of, write_atomically, write_json
from ddsr_core.storage.stage import RESUME, Stage, StageResult

BICUBIC = "bicubic"


def run(config: EvaluateConfig, *, test: Path, weights: Path | None = None, out: Path, runtime: Runtime) -> StageResult:
    """Measure a network on a test set. Writes ``per_image.parquet``, ``summary.json`` and close-ups in ``crops/``.

    An interrupted evaluation continues with the next image. Images that cannot be read or are too small are skipped and
    counted.

    Args:
        config: protocol and metrics.
        test: any photo source, or a folder of pairs (`ddsr_core.imaging.test_sets.find_pairs`).
        weights: a ``train_sr`` folder or a weights file; None measures bicubic.
        out: output folder.
        runtime: device and progress.

    Raises:
        ChangedInputError: photos or weights have changed since their digests were computed.
        InputError: no image could be measured, pairs do not match, or the weights cannot be read or have another scale.
        MissingWeightsError: a metric needs weights that are not installed.
    """
    device = resolve_device(runtime.device)
    network, name = _load(config, weights, device)
    weights_digest = {} if weights is None else {"weights": sha256_of(weights_file(weights))}
    tests = pinned_pairs(test, config.scale, config.multiple)
    runtime.require_unchanged("test", tests.digest, test)
    images = tests.pairs
    files = [out / RESUME / f"{index:06d}.json" for index in range(len(images))]
    missing = [index for index, file in enumerate(files) if not file.is_file()]
    if missing:
        evaluator = Evaluator(network, config, device, reference_features(test))
        closeups = {index: out / "crops" / f"{index:06d}" for index in _spread(len(images), config.crops)}
        done = len(images) - len(missing)
        with runtime.progress(f"Evaluating {name}", total=len(images), unit="photos", done=done) as bar:
            jobs = ((images[index], closeups.get(index)) for index in missing)
            scored = overlapped(jobs, partial(_enlarge_or_skip, evaluator), partial(_score, evaluator), device)
            for index, row in zip(missing, scored, strict=True):
                write_atomically(files[index], json.dumps(row).encode())  # not write_json: a PSNR may be infinite
                bar.advance()
    rows = [json.loads(file.read_bytes()) for file in files]
    summary = _summarize(name, config, rows, test, lr_given=images[0].lr is not None)
    _write_rows(out / "per_image.parquet", [row["scores"] for row in rows if "scores" in row])
    write_json(out / "summary.json", summary)
    counts = {key: summary[key] for key in ("network", "scale", "images", "identical", "metrics")}
    return StageResult({**counts, "skipped": len(summary["skipped"])}, inputs={"test": tests.digest, **weights_digest})


STAGE = Stage(
    "evaluate",
    version=3,
    run=run,
    config=EvaluateConfig,
    section="III",
    on_gpu=True,
    words="{network} on {images:,} test photos",
)


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
        images: names and HR images, uint8 (H, W, 3). LR images are made from them.
        config: protocol and metrics; None takes the defaults.
        device: torch device of the network.

    Raises:
        InputError: an image is too small to measure.
    """
    evaluator = Evaluator(network, config or EvaluateConfig(), device)

    def enlarge(image: tuple[str, np.ndarray]) -> Enlarged:
        name, hr = image
        return evaluator.enlarge(name, evaluator.cut(name, hr))

    return list(overlapped(images, enlarge, evaluator.score, device))


def _enlarge_or_skip(evaluator: Evaluator, job: tuple[HrImage, Path | None]) -> tuple[Enlarged | InputError, Path | None]:
    image, closeup = job
    try:
        hr, lr = evaluator.read(image)
    except ChangedInputError:
        raise
    except InputError as error:
        return InputError(error.what, where=image.hr.name), closeup
    return evaluator.enlarge(image.hr.name, hr, lr), closeup


def _score(evaluator: Evaluator, job: tuple[Enlarged | InputError, Path | None]) -> dict[str, Any]:
    """JSON row ``{"scores", "closeup"}`` of an image, or ``{"skipped": {"file", "reason"}}``.

    If ``closeup`` is a path, the close-up goes to ``<path>_hr.png``, ``_bicubic.png`` and ``_sr.png``.
    """
    image, closeup = job
    if isinstance(image, InputError):
        return {"skipped": {"file": image.where, "reason": image.what}}
    row: dict[str, Any] = {"scores": evaluator.score(image).row()}
    if closeup is not None:
        row["closeup"] = _store_closeup(closeup, image, evaluator.config) | {"image": image.name}
    return row


def _store_closeup(stem: Path, image: Enlarged, config: EvaluateConfig) -> dict[str, Any]:
    """Store the square where bicubic has the largest error, which is the same for every network."""
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
        return Bicubic(config.scale), BICUBIC
    network, scale, name = load_network(weights, config.trust)
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
    scores = [ImageScores.of_row(row["scores"]) for row in rows if "scores" in row]
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
        "mod_crop": config.multiple,
        "y": "rounded" if config.round_y else "not rounded",
        "lr": "given" if lr_given else "made from HR",
        "degradation": config.degradation,
        "metrics": mean_scores(scores),
        "images": len(scores),
        "identical": sum(math.isinf(row.values.get("psnr_rgb", 0)) for row in scores),
        "skipped": skipped,
        "crops": [row["closeup"] for row in rows if "closeup" in row],
    }


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    schema = pa.schema(
        [
            ("image", pa.string()),
            ("height", pa.int32()),
            ("width", pa.int32()),
            *((metric, pa.float64()) for metric in METRICS),
        ]
    )
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer)
    write_atomically(path, buffer.getvalue())
