"""Validation while an SR network is trained: metrics and pictures of its averaged weights on test photos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ddsr_core.errors import ChangedInputError, InputError
from ddsr_core.imaging.bicubic import make_lr, upsample
from ddsr_core.imaging.contact_sheet import contact_sheet
from ddsr_core.imaging.images import save_png, to_float, to_uint8
from ddsr_core.imaging.test_sets import HrImage, pinned_pairs, spare_px
from ddsr_core.imaging.tiling import enlarge
from ddsr_core.metrics.psnr_ssim import fidelity, full_precision, mean_psnr
from ddsr_core.metrics.spec import METRICS, MIN_SIDE_PX
from ddsr_core.sr.config import ValidationConfig
from ddsr_core.sr.degradation import RealEsrganDegradation, seed_of

TILE_PX, OVERLAP_PX = 512, 48
#: Side of the squares in a picture, in HR pixels.
PICTURE_PX = 128


@dataclass(frozen=True)
class Validated:
    """One validation.

    Attributes:
        step: steps done.
        values: mean of each metric over the photos.
    """

    step: int
    values: Mapping[str, float]


class Validator:
    """Measures networks on one test set, whose layouts are those of `ddsr_core.imaging.test_sets.find_pairs`.

    ``digest`` is that of the test set. A photo that changes afterwards ends the next validation.

    Args:
        config: metrics and pictures.
        test: photos, or pairs of HR and LR images.
        scale: upsampling factor of the networks.
        device: torch device of the networks.
        degrade: makes LR images that are not given; None: MATLAB's bicubic reduction.

    Raises:
        InputError: no photos, or pairs that do not match.
        MissingWeightsError: a metric needs weights that are not installed.
    """

    def __init__(
        self,
        config: ValidationConfig,
        test: Path,
        scale: int,
        device: str,
        degrade: RealEsrganDegradation | None = None,
    ) -> None:
        self.config, self.test, self.scale, self.device, self.degrade = config, test, scale, device, degrade
        tests = pinned_pairs(test, scale, scale)
        self.photos, self.digest = tests.pairs, tests.digest
        self.measures = {name: METRICS[name].load(device) for name in config.metrics if METRICS[name].measure}

    def validate(self, network: nn.Module, step: int, picture: Path) -> Validated:
        """Measure a network, and write a picture with one row per photo: bicubic | SR | HR, the center of the photo.

        Args:
            network: in evaluation mode.
            step: steps done.
            picture: the PNG file; not written if the config asks for no pictures.

        Raises:
            ChangedInputError: a photo has changed since the validator was made.
            InputError: no photo can be read and is large enough.
        """
        values: dict[str, list[float]] = {name: [] for name in self.config.metrics}
        cells: list[np.ndarray] = []
        for photo in self.photos:
            try:
                hr, lr = self.read(photo)
            except ChangedInputError:
                raise
            except InputError:
                continue
            with torch.no_grad(), full_precision():
                sr = enlarge(network, lr, scale=self.scale, tile_px=TILE_PX, overlap_px=OVERLAP_PX)
                for name, value in self.measure(sr, to_float(hr).to(self.device)).items():
                    values[name].append(value)
            if len(cells) < 3 * self.config.pictures:
                cells += [center(image) for image in (to_uint8(upsample(lr, self.scale))[0], to_uint8(sr)[0], hr)]
        if not any(values.values()):
            fix = f"use readable photos with sides of at least {MIN_SIDE_PX} px"
            raise InputError("no test photo can be measured", where=self.test, fix=fix)
        if cells:
            save_png(picture, contact_sheet(cells, columns=3, px=PICTURE_PX))
        return Validated(step, {name: mean_of(name, some) for name, some in values.items()})

    def read(self, photo: HrImage) -> tuple[np.ndarray, torch.Tensor]:
        """HR uint8 (H, W, 3), cropped to whole LR pixels, and LR float32 (1, 3, h, w).

        Raises:
            InputError: unreadable or too small.
        """
        hr, given = photo.hr.read(), photo.lr.read() if photo.lr else None
        height, width = hr.shape[:2]
        if given is None:
            spare_y, spare_x = height % self.scale, width % self.scale
        else:
            spare_y, spare_x = spare_px((height, width), (given.shape[0], given.shape[1]), self.scale)
        hr = hr[: height - spare_y, : width - spare_x]
        if min(hr.shape[:2]) < MIN_SIDE_PX:
            raise InputError("too small", where=photo.hr.name)
        if given is None and self.degrade:
            return hr, self.degrade(to_float(hr).to(self.device), seed_of(hr))
        lr = make_lr(to_float(hr), self.scale) if given is None else to_float(given)
        return hr, lr.to(self.device)

    def measure(self, sr: torch.Tensor, hr: torch.Tensor) -> dict[str, float]:
        """The metrics of one photo, both float32 (1, 3, H, W)."""
        pixel: Any = fidelity(sr, hr, crop_border=self.scale)
        return {
            name: self.measures[name](sr, hr).item() if name in self.measures else getattr(pixel, name).item()
            for name in self.config.metrics
        }

    def is_better(self, one: Validated, other: Validated | None) -> bool:
        """Whether a validation is better than another in the first metric of the config. Anything is better than None."""
        metric = self.config.metrics[0]
        return other is None or METRICS[metric].gain(one.values[metric], other.values[metric]) > 0

    def best(self, curve: list[Validated]) -> Validated | None:
        """The best validation of a curve, the earliest of equals."""
        best: Validated | None = None
        for validated in curve:
            best = validated if self.is_better(validated, best) else best
        return best

    def gives_up(self, curve: list[Validated]) -> bool:
        """Whether to stop early: too many validations have passed since the best one."""
        best = self.best(curve)
        return bool(self.config.early_stop and best and len(curve) - 1 - curve.index(best) >= self.config.early_stop)


def center(image: np.ndarray) -> np.ndarray:
    """The center of a (H, W, 3) image: a square of at most `PICTURE_PX`."""
    side = min(PICTURE_PX, *image.shape[:2])
    y, x = ((edge - side) // 2 for edge in image.shape[:2])
    return image[y : y + side, x : x + side]


def mean_of(metric: str, values: list[float]) -> float:
    """Mean over photos; infinite PSNR is left out unless there is nothing else."""
    mean = mean_psnr(values) if metric.startswith("psnr") else float(np.mean(values))
    return float("inf") if mean is None else mean


def curve_csv(curve: list[Validated], metrics: tuple[str, ...]) -> bytes:
    """``validation.csv``: step, and the mean of each metric."""
    lines = [",".join(("step", *metrics))]
    lines += [",".join((str(item.step), *(f"{item.values[name]:.6f}" for name in metrics))) for item in curve]
    return ("\n".join(lines) + "\n").encode()
