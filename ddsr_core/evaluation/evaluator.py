"""An SR network, or bicubic, measured image by image: enlarged on the calling thread, scored on others."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from ddsr_core.errors import InputError
from ddsr_core.evaluation.evaluate import MIN_SIDE_PX, EvaluateConfig, ImageScores
from ddsr_core.evaluation.test_sets import HrImage, spare_px
from ddsr_core.imaging.bicubic import make_lr
from ddsr_core.imaging.images import to_float
from ddsr_core.imaging.tiling import enlarge
from ddsr_core.metrics.dists import Dists
from ddsr_core.metrics.lpips import Lpips, distance
from ddsr_core.metrics.psnr_ssim import fidelity, full_precision

if TYPE_CHECKING:
    from ddsr_core.evaluation.evaluate import Network

Item = TypeVar("Item")
Ready = TypeVar("Ready")
Result = TypeVar("Result")

#: Images scored at a time; each takes the memory of its features.
MOST_WORKERS = 4
#: What `ReferenceFeatures` may hold: 250 photos of 481x321.
MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Enlarged:
    """An HR image and what a network made of its LR image.

    Attributes:
        name: of the image.
        hr: uint8 (H, W, 3), cut as the protocol says.
        lr: float32 (1, 3, H / scale, W / scale).
        sr: float32 (1, 3, H, W), as the network gave it.
    """

    name: str
    hr: np.ndarray
    lr: Tensor
    sr: Tensor


class ReferenceFeatures:
    """LPIPS features of HR images, for the next network that is measured on them; safe to use from several threads.

    What does not fit into ``most_bytes`` is computed again. Found by content, so that nothing can be out of date.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._left, self._held, self._lock = most_bytes, dict[str, list[Tensor]](), threading.Lock()

    def of(self, image: np.ndarray, lpips: Lpips) -> list[Tensor]:
        """Features of a uint8 (H, W, 3) image."""
        key = hashlib.sha256(repr((lpips.net, str(lpips.device), image.shape)).encode() + image.tobytes()).hexdigest()
        with self._lock:
            found = self._held.get(key)
        if found is not None:
            return found
        made = lpips.features(to_float(image).to(lpips.device))
        size = sum(layer.numel() * layer.element_size() for layer in made)
        with self._lock:
            if key not in self._held and size <= self._left:
                self._held[key] = made
                self._left -= size
        return made


class _LastTestSet:
    """The features of the test set that was measured last in this process."""

    def __init__(self) -> None:
        self._lock, self._test, self._features = threading.Lock(), Path(), ReferenceFeatures(0)

    def features_of(self, test: Path) -> ReferenceFeatures:
        with self._lock:
            if self._test != test:
                self._test, self._features = test, ReferenceFeatures()
            return self._features


_LAST = _LastTestSet()


def reference_features(test: Path) -> ReferenceFeatures:
    """The features kept for a test set. One set's at a time: a grid measures many networks on the same photos."""
    return _LAST.features_of(Path(test).absolute())


class Evaluator:
    """A network ready to be measured on one image after the other.

    Args:
        network: on ``device``.
        config: protocol and metrics.
        device: torch device string.
        references: features of HR images that are known already.
    """

    def __init__(
        self, network: Network, config: EvaluateConfig, device: str, references: ReferenceFeatures | None = None
    ) -> None:
        self.network, self.config, self.device = network, config, device
        self.references = references or ReferenceFeatures(0)
        self.lpips: dict[str, Lpips] = {}
        if config.lpips:
            self.lpips["lpips"] = Lpips("alex", device)
        if config.lpips_vgg:
            self.lpips["lpips_vgg"] = Lpips("vgg", device)
        self.dists = Dists(device) if config.dists else None

    def read(self, image: HrImage) -> tuple[np.ndarray, np.ndarray | None]:
        """HR image, cut as the protocol says, and the LR image where one is given.

        Raises:
            InputError: they cannot be read, do not belong together or are too small.
        """
        hr, lr = image.hr.read(), image.lr.read() if image.lr else None
        return self.cut(image.hr.name, hr, lr), lr

    def cut(self, name: str, hr: np.ndarray, lr: np.ndarray | None = None) -> np.ndarray:
        """HR image, uint8 (H, W, 3), cut to ``scale`` times the LR image, or to a multiple of ``mod_crop``.

        Raises:
            InputError: ``lr`` is not of that size, or too little is left to measure.
        """
        height, width = hr.shape[:2]
        if lr is None:
            spare_x, spare_y = width % self.config.mod_crop, height % self.config.mod_crop
        else:
            lr_size = lr.shape[1], lr.shape[0]
            spare_x, spare_y = spare_px((width, height), lr_size, self.config.scale, self.config.mod_crop)
        if min(height - spare_y, width - spare_x) < MIN_SIDE_PX:
            raise InputError(
                f"too small: {width}x{height}",
                where=name,
                fix=f"sides of at least {MIN_SIDE_PX} px are needed",
            )
        return hr[: height - spare_y, : width - spare_x]

    def enlarge(self, name: str, hr: np.ndarray, lr: np.ndarray | None = None) -> Enlarged:
        """Enlarge one image; ``lr`` is made from ``hr``, uint8 (H, W, 3), where it is None.

        Raises:
            InputError: the network cannot take it.
        """
        config = self.config
        small = make_lr(to_float(hr).to(self.device), config.scale) if lr is None else to_float(lr).to(self.device)
        sr = enlarge(self.network, small, scale=config.scale, tile_px=config.tile_px, overlap_px=config.tile_overlap_px)
        return Enlarged(name, hr, small, sr)

    def score(self, image: Enlarged) -> ImageScores:
        """Every metric of one image."""
        target = to_float(image.hr).to(self.device)
        pixel = fidelity(image.sr, target, crop_border=self.config.scale, round_y=self.config.round_y)
        perceptual = {
            name: distance(lpips.features(image.sr), self.references.of(image.hr, lpips)).item()
            for name, lpips in self.lpips.items()
        }
        return ImageScores(
            image=image.name,
            height=image.hr.shape[0],
            width=image.hr.shape[1],
            psnr_y=pixel.psnr_y.item(),
            ssim_y=pixel.ssim_y.item(),
            psnr_rgb=pixel.psnr_rgb.item(),
            ssim_rgb=pixel.ssim_rgb.item(),
            lpips=perceptual.get("lpips"),
            lpips_vgg=perceptual.get("lpips_vgg"),
            dists=None if self.dists is None else self.dists(image.sr, target).item(),
        )


def overlapped(
    items: Iterable[Item], prepare: Callable[[Item], Ready], finish: Callable[[Ready], Result], device: str
) -> Iterator[Result]:
    """``finish(prepare(item))`` of each item, in order.

    ``prepare`` (a network, which may keep state) runs on this thread with all cores; ``finish`` on other threads, one
    core an image where there are many, which serves the metrics' small steps better than many cores an image.
    """
    cores = torch.get_num_threads()
    workers = min(cores, MOST_WORKERS) if torch.device(device).type == "cpu" else 1
    begin = torch.set_num_threads
    waiting: deque[Future[Result]] = deque()
    try:
        # held here, because it is one setting for all threads
        with full_precision(), ThreadPoolExecutor(workers, initializer=begin, initargs=(cores // workers,)) as pool:
            for item in items:
                waiting.append(pool.submit(finish, prepare(item)))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(cores)  # what a worker sets is also what later threads begin with
