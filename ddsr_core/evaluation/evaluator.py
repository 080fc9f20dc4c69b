"""A network, or bicubic, measured image by image: images are enlarged on the calling thread and scored on others."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ddsr_core.errors import InputError
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.evaluation.scores import ImageScores
from ddsr_core.imaging.bicubic import downsample, make_lr, upsample
from ddsr_core.imaging.images import to_float
from ddsr_core.imaging.test_sets import HrImage, spare_px
from ddsr_core.imaging.tiling import enlarge
from ddsr_core.metrics.lpips import Lpips, distance
from ddsr_core.metrics.psnr_ssim import fidelity, full_precision, luma_fidelity, rgb_to_y, to_levels
from ddsr_core.metrics.spec import METRICS, MIN_SIDE_PX
from ddsr_core.sr.degradation import degrader_of, seed_of, smallest_px

#: float32 (B, 3, h, w) in [0, 1] to (B, 3, h * scale, w * scale).
Network = Callable[[Tensor], Tensor]
#: Two batches (B, 3, H, W) in [0, 1], SR and HR, to values (B,).
Measure = Callable[[Tensor, Tensor], Tensor]
Item = TypeVar("Item")
Ready = TypeVar("Ready")
Result = TypeVar("Result")

#: Most images that are scored at once. Each takes the memory of its features.
MOST_WORKERS = 4
#: Capacity of `ReferenceFeatures`: 250 photos of 481x321.
MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Enlarged:
    """An HR image with its LR image and the network's output.

    Attributes:
        name: name of the image.
        hr: uint8 (H, W, 3), cropped as the protocol says.
        lr: float32 (1, 3, H / scale, W / scale).
        sr: float32 (1, 3, H, W), output of the network, not clamped.
        sr_y: (1, 1, H, W) in 0..255, Y enlarged separately (`published_bicubic_y`); None: Y of ``sr`` is measured.
    """

    name: str
    hr: np.ndarray
    lr: Tensor
    sr: Tensor
    sr_y: Tensor | None = None


class ReferenceFeatures:
    """Cache of LPIPS features of HR images, reused by the next network that is measured on them. Thread-safe.

    Features beyond ``most_bytes`` are computed again. Keys are digests of the pixels, so that entries cannot be stale.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._left, self._held, self._lock = most_bytes, dict[str, list[Tensor]](), threading.Lock()

    def of(self, image: np.ndarray, lpips: Lpips) -> list[Tensor]:
        """Features of a uint8 (H, W, 3) image."""
        key = hashlib.sha256(repr((lpips.net, str(lpips.device), image.shape)).encode() + image.tobytes()).hexdigest()
        with self._lock:
            cached = self._held.get(key)
        if cached is not None:
            return cached
        features = lpips.features(to_float(image).to(lpips.device))
        size = sum(layer.numel() * layer.element_size() for layer in features)
        with self._lock:
            if key not in self._held and size <= self._left:
                self._held[key] = features
                self._left -= size
        return features


class _LastTestSet:
    """The feature cache of the test set that this process measured last."""

    def __init__(self) -> None:
        self._lock, self._test, self._features = threading.Lock(), Path(), ReferenceFeatures(0)

    def features_of(self, test: Path) -> ReferenceFeatures:
        with self._lock:
            if self._test != test:
                self._test, self._features = test, ReferenceFeatures()
            return self._features


_LAST = _LastTestSet()


def reference_features(test: Path) -> ReferenceFeatures:
    """The feature cache of a test set. Only that of the last test set is kept, which experiments use for many networks."""
    return _LAST.features_of(Path(test).absolute())


class Evaluator:
    """Measures one network, image by image.

    Args:
        network: on ``device``.
        config: protocol and metrics.
        device: torch device string.
        references: cached features of HR images.

    Raises:
        MissingWeightsError: a metric needs weights that are not installed.
    """

    def __init__(
        self, network: Network, config: EvaluateConfig, device: str, references: ReferenceFeatures | None = None
    ) -> None:
        self.network, self.config, self.device = network, config, device
        self.references = references or ReferenceFeatures(0)
        self.degrade = degrader_of(config.degradation, config.scale, device)
        self.measures: dict[str, Measure] = {
            name: METRICS[name].load(device) for name in config.metrics if METRICS[name].measure
        }
        self.fidelities = [name for name in config.metrics if not METRICS[name].measure]

    def read(self, image: HrImage) -> tuple[np.ndarray, np.ndarray | None]:
        """HR image, cropped as the protocol says, and the LR image if one is given.

        Raises:
            InputError: an image cannot be read, or the two do not match or are too small.
        """
        hr, lr = image.hr.read(), image.lr.read() if image.lr else None
        return self.cut(image.hr.name, hr, lr), lr

    def cut(self, name: str, hr: np.ndarray, lr: np.ndarray | None = None) -> np.ndarray:
        """HR image, uint8 (H, W, 3), cropped to ``scale`` times the LR image, or to a multiple of ``mod_crop``.

        Raises:
            InputError: ``lr`` has another size, or too little is left to measure.
        """
        height, width = hr.shape[:2]
        if lr is None:
            spare_x, spare_y = width % self.config.multiple, height % self.config.multiple
        else:
            lr_size = lr.shape[1], lr.shape[0]
            spare_x, spare_y = spare_px((width, height), lr_size, self.config.scale, self.config.multiple)
        smallest = smallest_px(self.config.scale) if self.degrade and lr is None else MIN_SIDE_PX
        if min(height - spare_y, width - spare_x) < smallest:
            raise InputError(
                f"too small: {width}x{height}",
                where=name,
                fix=f"use images with sides of at least {smallest} px",
            )
        return hr[: height - spare_y, : width - spare_x]

    def enlarge(self, name: str, hr: np.ndarray, lr: np.ndarray | None = None) -> Enlarged:
        """Enlarge one image. If ``lr`` is None it is made from ``hr``, uint8 (H, W, 3).

        Raises:
            InputError: the network rejects the image.
        """
        config = self.config
        small = self.make_lr(hr) if lr is None else to_float(lr).to(self.device)
        sr = enlarge(self.network, small, scale=config.scale, tile_px=config.tile_px, overlap_px=config.tile_overlap_px)
        alone = lr is None and config.round_y and self.degrade is None and isinstance(self.network, Bicubic)
        sr_y = published_bicubic_y(luma(hr, self.device), config.scale) if alone else None
        return Enlarged(name, hr, small, sr, sr_y)

    def make_lr(self, hr: np.ndarray) -> Tensor:
        """LR image of a uint8 (H, W, 3) image, float32 (1, 3, h, w)."""
        image = to_float(hr).to(self.device)
        return self.degrade(image, seed_of(hr)) if self.degrade else make_lr(image, self.config.scale)

    def score(self, image: Enlarged) -> ImageScores:
        """Every metric of one image."""
        target = to_float(image.hr).to(self.device)
        values: dict[str, float] = {}
        if self.fidelities:
            pixel = fidelity(image.sr, target, crop_border=self.config.scale, round_y=self.config.round_y)
            values = {name: getattr(pixel, name).item() for name in self.fidelities}
            if image.sr_y is not None:
                psnr, ssim = luma_fidelity(image.sr_y, luma(image.hr, self.device), crop_border=self.config.scale)
                alone = {"psnr_y": psnr.item(), "ssim_y": ssim.item()}
                values |= {name: value for name, value in alone.items() if name in values}
        for name, measure in self.measures.items():
            if isinstance(measure, Lpips):
                values[name] = distance(measure.features(image.sr), self.references.of(image.hr, measure)).item()
            else:
                values[name] = measure(image.sr, target).item()
        return ImageScores(image.name, image.hr.shape[0], image.hr.shape[1], values)


class Bicubic:
    """Bicubic enlargement with the interface of a network.

    Args:
        scale: upsampling factor.
    """

    def __init__(self, scale: int) -> None:
        self.scale = scale

    def __call__(self, lr: Tensor) -> Tensor:
        return upsample(lr, self.scale)


def luma(image: np.ndarray, device: str) -> Tensor:
    """Y of a uint8 (H, W, 3) image, rounded to whole levels: (1, 1, H, W) in 16..235."""
    return rgb_to_y(to_levels(to_float(image).to(device))).round()


def published_bicubic_y(hr_y: Tensor, scale: int) -> Tensor:
    """The bicubic row of published tables: Y is reduced and enlarged alone, and the LR image is not rounded.

    The rows go back to the scripts of SRCNN (Dong et al., TPAMI 2016): 33.66 dB, 30.39 dB and 28.42 dB on Set5.

    Args:
        hr_y: (1, 1, H, W) in 0..255, rounded.
        scale: factor of both.

    Returns:
        (1, 1, H, W), rounded.
    """
    return upsample(downsample(hr_y, scale), scale).round().clamp(0, 255)


def overlapped(
    items: Iterable[Item], prepare: Callable[[Item], Ready], finish: Callable[[Ready], Result], device: str
) -> Iterator[Result]:
    """``finish(prepare(item))`` of each item, in order.

    ``prepare`` (a network, which may have state) runs on this thread with all cores. ``finish`` runs on other threads, each
    with its share of the cores: metrics consist of small operations that scale better over images than over cores.
    """
    cores = torch.get_num_threads()
    workers = min(cores, MOST_WORKERS) if torch.device(device).type == "cpu" else 1
    begin = torch.set_num_threads
    waiting: deque[Future[Result]] = deque()
    try:
        # set once here: the setting is global
        with full_precision(), ThreadPoolExecutor(workers, initializer=begin, initargs=(cores // workers,)) as pool:
            for item in items:
                waiting.append(pool.submit(finish, prepare(item)))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(cores)  # a worker's setting is inherited by later threads
