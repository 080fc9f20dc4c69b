"""Stage `evaluate`: an SR network, or plain bicubic, on a test set: PSNR and SSIM on Y and RGB, LPIPS-alex.

The field's protocol: the HR image is cut to a multiple of ``mod_crop``, the LR image is made from it by
MATLAB's bicubic reduction and rounded to 8 bits (or lies beside it), the network sees the whole image in
float32, and the metrics of `ddsr_core.metrics` are averaged over images. Bicubic x4 on B100 (100 photos)
gives 25.96 dB and .6682 on Y.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from ddsr_core.config import Runtime, StageConfig, resolve_device
from ddsr_core.errors import InputError
from ddsr_core.images import Photo, iter_photos, save_png, to_float, to_uint8
from ddsr_core.store import RESUME, Stage, StageResult, write_atomically, write_json

if TYPE_CHECKING:
    import torch

    from ddsr_core.lpips_metric import LpipsAlex

    #: float32 (B, 3, h, w) in [0, 1] to (B, 3, h * scale, w * scale)
    Network = Callable[[torch.Tensor], torch.Tensor]

METRICS = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "lpips")
BICUBIC = "bicubic"
#: LPIPS and the SSIM window need this much of the HR image.
MIN_SIDE_PX = 32


class EvaluateConfig(StageConfig):
    """How a network is measured."""

    scale: int = Field(default=4, ge=2, le=8, description="enlargement; the weights must have the same")
    mod_crop: int = Field(default=4, ge=1, le=64, description="HR sides are cut to a multiple of it; OST300: 8")
    lpips: bool = Field(default=True, description="measure LPIPS (v0.1, AlexNet) too")
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
    """One row of ``per_image.parquet``. PSNR in dB (inf where SR equals HR); ``lpips`` None: not measured.

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


@dataclass(frozen=True)
class HrImage:
    """An HR image and, in a set of pairs, its given LR image."""

    hr: Photo
    lr: Photo | None = None


def run(config: EvaluateConfig, *, test: Path, weights: Path | None = None, out: Path, runtime: Runtime) -> StageResult:
    """Measure ``weights`` (a ``train-sr`` folder or a weights file; None: bicubic) on the images of ``test``.

    ``test`` is any photo source, or a folder of pairs: ``HR/`` and ``LRx<scale>/`` with the same file names.
    Continues image by image after a kill. Images that cannot be read or are too small are counted as skipped.

    Raises:
        InputError: no image could be measured, or the weights have another scale or cannot be read.
        MissingWeightsError: LPIPS is wanted and its trunk is not installed.
    """
    network, name = _load(config, weights, resolve_device(runtime.device))
    images = find_test_images(test, config.scale)
    closeups = _spread(len(images), config.crops)
    files = [out / RESUME / f"{index:06d}.json" for index in range(len(images))]
    missing = [index for index, file in enumerate(files) if not file.is_file()]
    if missing:
        evaluator = Evaluator(network, config, resolve_device(runtime.device))
        done = len(images) - len(missing)
        with runtime.progress(f"Evaluating {name}", total=len(images), unit="photos", done=done) as bar:
            for index in missing:
                closeup = out / "crops" / f"{index:06d}" if index in closeups else None
                row = evaluator.measure_or_skip(images[index], closeup)
                write_atomically(files[index], json.dumps(row).encode())  # no write_json: a PSNR may be inf
                bar.advance()
    rows = [json.loads(file.read_bytes()) for file in files]
    summary = _summarise(name, config, rows, test)
    _write_rows(out / "per_image.parquet", [row["scores"] for row in rows if "scores" in row])
    write_json(out / "summary.json", summary)
    return StageResult({key: summary[key] for key in ("network", "scale", "images", "identical", "metrics")}
                       | {"skipped": len(summary["skipped"])})  # fmt: skip


STAGE = Stage("evaluate", version=1, run=run)


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
    evaluator = Evaluator(network, config or EvaluateConfig(), device)
    return [evaluator.measure(name, hr)[0] for name, hr in images]


def mean_scores(scores: Iterable[ImageScores]) -> dict[str, float | None]:
    """Mean of each metric over images; infinite PSNR is left out (`mean_psnr`). None: no value."""
    from ddsr_core.metrics import mean_psnr

    rows = list(scores)
    means: dict[str, float | None] = {}
    for metric in METRICS:
        values = [value for row in rows if (value := getattr(row, metric)) is not None]
        means[metric] = mean_psnr(values) if metric.startswith("psnr") else _mean(values)
    return means


def find_test_images(test: Path | str, scale: int = 4) -> list[HrImage]:
    """The images of a test set: pairs where ``HR/`` and ``LRx<scale>/`` lie in the folder, else HR images.

    Pairs have the same file name but for the suffix; ``0801x4.png`` belongs to ``0801.png`` too.

    Raises:
        InputError: there is no image.
    """
    hr_folder, lr_folder = Path(test) / "HR", Path(test) / f"LRx{scale}"
    if not (hr_folder.is_dir() and lr_folder.is_dir()):
        images = [HrImage(photo) for photo in iter_photos(test)]
    else:
        partners = {re.sub(rf"x{scale}$", "", _stem(photo)): photo for photo in iter_photos(lr_folder)}
        images = [HrImage(photo, partners.get(_stem(photo), _absent(photo.name))) for photo in iter_photos(hr_folder)]
    if not images:
        raise InputError("the test set has no images", where=test, mend="name a folder of HR images")
    return images


def _stem(photo: Photo) -> str:
    return Path(photo.name).with_suffix("").as_posix()


def _absent(name: str) -> Photo:
    def load() -> bytes:
        raise InputError("has no LR partner", where=name, mend="remove the HR image or add its LR image")

    return Photo(name, load)


class Evaluator:
    """A network ready to be measured on one image after the other."""

    def __init__(self, network: Network, config: EvaluateConfig, device: str) -> None:
        from ddsr_core.lpips_metric import LpipsAlex

        self.network, self.config, self.device = network, config, device
        self.lpips: LpipsAlex | None = LpipsAlex(device) if config.lpips else None

    def measure_or_skip(self, image: HrImage, closeup: Path | None = None) -> dict[str, Any]:
        """JSON row ``{"scores", "closeup"}`` of an image, or ``{"skipped": {"file", "reason"}}``.

        With ``closeup`` a cut-out goes to ``<closeup>_hr.png``, ``_bicubic.png`` and ``_sr.png``.
        """
        try:
            hr = image.hr.read()
            lr = image.lr.read() if image.lr else None
            hr = _cut_to_partner(hr, lr, self.config) if lr is not None else _cut(hr, self.config.mod_crop)
            _check_size(hr, image.hr.name)
        except InputError as error:
            return {"skipped": {"file": image.hr.name, "reason": error.what}}
        scores, sr = self.measure(image.hr.name, hr, lr)
        row: dict[str, Any] = {"scores": asdict(scores)}
        if closeup is not None:
            row["closeup"] = self._store_closeup(closeup, hr, lr, sr) | {"image": image.hr.name}
        return row

    def measure(self, name: str, hr: np.ndarray, lr: np.ndarray | None = None) -> tuple[ImageScores, torch.Tensor]:
        """Scores of one image, and its SR image (1, 3, H, W), float, as the network gave it.

        Args:
            name: goes into the scores.
            hr: uint8 (H, W, 3); cut to a multiple of ``mod_crop`` first where no ``lr`` is given.
            lr: uint8 (H / scale, W / scale, 3), or None to make it from ``hr``.
        """
        from ddsr_core.metrics import fidelity
        from ddsr_core.tiling import enlarge

        config = self.config
        hr = _cut(hr, config.mod_crop) if lr is None else hr
        _check_size(hr, name)
        target = to_float(hr).to(self.device)
        sr = enlarge(
            self.network,
            self._lr(target, lr),
            scale=config.scale,
            tile_px=config.tile_px,
            overlap_px=config.tile_overlap_px,
        )
        pixel = fidelity(sr, target, crop_border=config.scale)
        scores = ImageScores(
            image=name,
            height=hr.shape[0],
            width=hr.shape[1],
            psnr_y=pixel.psnr_y.item(),
            ssim_y=pixel.ssim_y.item(),
            psnr_rgb=pixel.psnr_rgb.item(),
            ssim_rgb=pixel.ssim_rgb.item(),
            lpips=None if self.lpips is None else self.lpips(sr, target).item(),
        )
        return scores, sr

    def _lr(self, target: torch.Tensor, lr: np.ndarray | None) -> torch.Tensor:
        from ddsr_core.bicubic import make_lr

        return make_lr(target, self.config.scale) if lr is None else to_float(lr).to(self.device)

    def _store_closeup(self, stem: Path, hr: np.ndarray, lr: np.ndarray | None, sr: torch.Tensor) -> dict[str, Any]:
        """Cut out the square where bicubic loses most: the same for every network."""
        from ddsr_core.bicubic import upsample

        bicubic = to_uint8(upsample(self._lr(to_float(hr).to(self.device), lr), self.config.scale))[0]
        top, left, side = _hardest_square(hr, bicubic, self.config.crop_px)
        entry: dict[str, Any] = {"y": top, "x": left, "px": side}
        for kind, image in {"hr": hr, "bicubic": bicubic, "sr": to_uint8(sr)[0]}.items():
            path = stem.with_name(f"{stem.name}_{kind}.png")
            save_png(path, image[top : top + side, left : left + side])
            entry[kind] = f"{path.parent.name}/{path.name}"
        return entry


def _load(config: EvaluateConfig, weights: Path | None, device: str) -> tuple[Network, str]:
    if weights is None:
        from ddsr_core.bicubic import upsample

        return lambda lr: upsample(lr, config.scale), BICUBIC
    from ddsr_core.sr.weights import load_network

    network, scale, name = load_network(weights)
    if scale != config.scale:
        raise InputError(
            f"the weights enlarge x{scale}, the evaluation is for x{config.scale}",
            where=weights,
            mend=f"set evaluate.scale={scale}, or use x{config.scale} weights",
        )
    return network.to(device).eval(), name


def _cut(hr: np.ndarray, multiple: int) -> np.ndarray:
    height, width = (side - side % multiple for side in hr.shape[:2])
    return hr[:height, :width]


def _cut_to_partner(hr: np.ndarray, lr: np.ndarray, config: EvaluateConfig) -> np.ndarray:
    height, width = (side * config.scale for side in lr.shape[:2])
    spare = hr.shape[0] - height, hr.shape[1] - width
    if min(spare) < 0 or max(spare) >= max(config.mod_crop, config.scale):
        raise InputError(
            f"LR {lr.shape[1]}x{lr.shape[0]} is not HR {hr.shape[1]}x{hr.shape[0]} divided by {config.scale}",
            mend=f"give LR images of 1/{config.scale} the size",
        )
    return hr[:height, :width]


def _check_size(hr: np.ndarray, name: str) -> None:
    if min(hr.shape[:2]) < MIN_SIDE_PX:
        raise InputError(
            f"too small: {hr.shape[1]}x{hr.shape[0]}",
            where=name,
            mend=f"sides of at least {MIN_SIDE_PX} px are needed",
        )


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


def _summarise(name: str, config: EvaluateConfig, rows: list[dict[str, Any]], test: Path) -> dict[str, Any]:
    scores = [ImageScores(**row["scores"]) for row in rows if "scores" in row]
    skipped = [row["skipped"] for row in rows if "skipped" in row]
    if not scores:
        first = skipped[0]
        raise InputError(
            f"none of {len(skipped)} test images could be measured; {first['file']}: {first['reason']}",
            where=test,
            mend=f"name a folder of readable HR images with sides of at least {MIN_SIDE_PX} px",
        )
    return {
        "network": name,
        "scale": config.scale,
        "crop_border_px": config.scale,
        "mod_crop": config.mod_crop,
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
            *((m, pa.float64()) for m in METRICS),
        ]
    )
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer)
    write_atomically(path, buffer.getvalue())


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
