"""Training pairs. Every image is decoded once, its LR image is made once, and crops are slices of the packed raw bytes.

The LR crop is cut from the LR of the whole image, so that it is correct up to the border of the crop. Crop i of step t
depends on (seed, t, i) alone, so that training can resume at any step.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ddsr_core.errors import InputError
from ddsr_core.imaging.bicubic import make_lr
from ddsr_core.imaging.decode import UnusableImage
from ddsr_core.imaging.images import to_float, to_uint8
from ddsr_core.imaging.photos import count_photos, iter_photos, source_digest
from ddsr_core.progress import ProgressFactory, silent
from ddsr_core.storage.files import write_json

T = TypeVar("T")
UPLOAD_BYTES = 2**28


class Share(NamedTuple):
    """Which part of every batch a process computes: part ``rank`` of ``processes`` equal parts."""

    rank: int
    processes: int


WHOLE = Share(0, 1)


@dataclass(frozen=True)
class Pairs:
    """Packed HR and LR images.

    Attributes:
        hr, lr: uint8, memory-mapped: the (height, width, 3) arrays of all images, concatenated.
        lr_sizes: (n, 2) int64, height and width of each LR image. HR images are ``scale`` times as large.
        scale: upsampling factor.
        lr_patch_px: height and width of the LR crops.
        skipped: number of images left out, by reason.
        source: digest of the images as they were read, as of `ddsr_core.imaging.photos.photo_source`.
    """

    hr: np.ndarray
    lr: np.ndarray
    lr_sizes: np.ndarray
    scale: int
    lr_patch_px: int
    skipped: dict[str, int]
    source: str = ""

    def __len__(self) -> int:
        return len(self.lr_sizes)

    @cached_property
    def ends(self) -> np.ndarray:
        """(n,) number of LR pixels up to and including each image."""
        return np.cumsum(self.lr_sizes.prod(axis=1))

    @property
    def hr_pixels(self) -> int:
        return int(self.ends[-1]) * self.scale**2

    def image(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """LR ``(h, w, 3)`` and HR ``(scale h, scale w, 3)`` of one image: uint8 views, no copies."""
        (h, w), s = self.lr_sizes[index], self.scale
        end = self.ends[index] * 3
        start = end - h * w * 3
        return self.lr[start:end].reshape(h, w, 3), self.hr[start * s**2 : end * s**2].reshape(h * s, w * s, 3)

    def draw(self, seed: int, step: int, batch: int) -> Draw:
        """Sample the crops of a step: an image in proportion to its area, a corner in whole LR pixels, one of 8 turns."""
        generator = np.random.default_rng([seed, step])
        images = np.searchsorted(self.ends, generator.integers(self.ends[-1], size=batch), side="right")
        corners = generator.random((batch, 2)) * (self.lr_sizes[images] - self.lr_patch_px + 1)
        return Draw(images, corners.astype(np.int64), generator.integers(8, size=batch))

    def cut(self, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
        """Cut sampled crops, uint8: LR ``(batch, p, p, 3)`` and HR ``(batch, scale p, scale p, 3)``."""
        p, s, batch = self.lr_patch_px, self.scale, len(draw.images)
        lr_out = np.empty((batch, p, p, 3), np.uint8)
        hr_out = np.empty((batch, p * s, p * s, 3), np.uint8)
        for i, (index, (y, x), turn) in enumerate(zip(*draw, strict=True)):
            lr, hr = self.image(index)
            lr_out[i] = turned(lr[y : y + p, x : x + p], turn)
            hr_out[i] = turned(hr[y * s : (y + p) * s, x * s : (x + p) * s], turn)
        return lr_out, hr_out

    def crops(self, seed: int, step: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """`draw` and `cut` in one: uint8 LR ``(batch, p, p, 3)`` and HR ``(batch, scale p, scale p, 3)``."""
        return self.cut(self.draw(seed, step, batch))

    def batch(self, seed: int, step: int, batch: int, device: torch.device, share: Share = WHOLE) -> tuple[Tensor, Tensor]:
        """`crops`, or a process's share of them, as float32 ``(n, 3, …)`` in [0, 1], channels-last, on the device."""
        lr, hr = self.cut(self.draw(seed, step, batch).part(share))
        return _to_device(lr, device), _to_device(hr, device)


class Draw(NamedTuple):
    """Where a batch of crops lies: image index ``(batch,)``, top and left ``(batch, 2)`` in LR pixels, turn ``(batch,)``."""

    images: np.ndarray
    corners: np.ndarray
    turns: np.ndarray

    def part(self, share: Share) -> Draw:
        """The crops of one process."""
        return Draw(*(np.split(values, share.processes)[share.rank] for values in self))


class Resident:
    """The packed pixels in GPU memory. A batch is one gather on the GPU, and only its coordinates are uploaded.

    Args:
        pairs: packed pairs (`pack_pairs`).
        device: CUDA device.
    """

    def __init__(self, pairs: Pairs, device: torch.device) -> None:
        self.pairs, self.device = pairs, device
        self.lr, self.hr = _upload(pairs.lr, device), _upload(pairs.hr, device)
        self.starts = np.concatenate([[0], pairs.ends[:-1]])  # first LR pixel of each image
        self.turns = {factor: self._turns(factor) for factor in (1, pairs.scale)}

    def batch(self, seed: int, step: int, batch: int, share: Share = WHOLE) -> tuple[Tensor, Tensor]:
        """The same values as `Pairs.batch`."""
        draw = self.pairs.draw(seed, step, batch).part(share)
        return self._gather(self.lr, draw, 1), self._gather(self.hr, draw, self.pairs.scale)

    def _gather(self, pixels: Tensor, draw: Draw, factor: int) -> Tensor:
        places = self.turns[factor][torch.from_numpy(draw.turns).to(self.device)]
        widths = self.pairs.lr_sizes[draw.images, 1] * factor
        first = self.starts[draw.images] * factor**2 + draw.corners[:, 0] * factor * widths + draw.corners[:, 1] * factor
        first_, widths_ = (torch.from_numpy(a).to(self.device)[:, None, None] for a in (first, widths))
        return _as_floats(pixels[first_ + places[..., 0] * widths_ + places[..., 1]])

    def _turns(self, factor: int) -> Tensor:
        """Source row and column of each pixel of a turned crop: (8, p, p, 2) int64."""
        px = self.pairs.lr_patch_px * factor
        grid = np.stack(np.meshgrid(np.arange(px), np.arange(px), indexing="ij"), axis=-1)
        return torch.from_numpy(np.stack([turned(grid, turn) for turn in range(8)])).to(self.device)


def batches(
    pairs: Pairs, seed: int, steps: range, batch: int, device: torch.device, share: Share = WHOLE
) -> Iterator[tuple[Tensor, Tensor]]:
    """`Pairs.batch` of each step in order.

    On a GPU, the pixels are kept in GPU memory if they take at most a quarter of what is free. Otherwise a thread cuts the
    next batch while the GPU works on the current one.
    """
    if device.type != "cuda":
        yield from (pairs.batch(seed, step, batch, device, share) for step in steps)
        return
    free, _ = torch.cuda.mem_get_info(device)
    if pairs.hr.nbytes + pairs.lr.nbytes <= free // 4:
        resident = Resident(pairs, device)
        yield from (resident.batch(seed, step, batch, share) for step in steps)
    else:
        yield from prefetch(lambda step: pairs.batch(seed, step, batch, device, share), steps)


def prefetch(make: Callable[[int], T], steps: range) -> Iterator[T]:
    """``make(step)`` of every step in order. Each one is started while the previous one is in use."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = None
        for step in steps:
            ready, waiting = waiting, pool.submit(make, step)
            if ready is not None:
                yield ready.result()
        if waiting is not None:
            yield waiting.result()


def turned(crop: np.ndarray, turn: int) -> np.ndarray:
    """One of the 8 symmetries of the square: ``turn % 4`` quarter turns, mirrored for ``turn >= 4``."""
    crop = np.rot90(crop, turn % 4)
    return crop[:, ::-1] if turn >= 4 else crop


def pack_pairs(data: Path, folder: Path, lr_patch_px: int, scale: int = 4, progress: ProgressFactory = silent) -> Pairs:
    """Decode every image of ``data`` into ``folder`` and memory-map the pairs. A complete folder is reused.

    Images are cropped at the bottom and right to a multiple of ``scale``. Images that cannot be read or are smaller than
    a crop are skipped and counted.

    Raises:
        InputError: no image is left.
    """
    index = folder / "packed.json"
    if not index.exists():
        folder.mkdir(parents=True, exist_ok=True)
        packed = _pack(data, folder, lr_patch_px, scale, progress)
        write_json(index, packed)  # written last: the folder is complete once it exists
    packed = json.loads(index.read_text())
    return Pairs(
        hr=np.memmap(folder / "hr.bin", np.uint8, "r"),
        lr=np.memmap(folder / "lr.bin", np.uint8, "r"),
        lr_sizes=np.array(packed["lr_sizes"], np.int64).reshape(-1, 2),
        scale=scale,
        lr_patch_px=lr_patch_px,
        skipped=packed["skipped"],
        source=packed["source"],
    )


def count_images(data: Path) -> int:
    """Number of images that `iter_photos` yields from a folder or Parquet, without decoding them.

    Raises:
        InputError: the path does not exist, or a Parquet file is damaged.
    """
    return count_photos(data)


def _pack(data: Path, folder: Path, lr_patch_px: int, scale: int, progress: ProgressFactory) -> dict[str, Any]:
    """Returns ``lr_sizes``, ``skipped`` and ``source`` of `Pairs`."""
    sizes: list[tuple[int, int]] = []
    entries: list[tuple[str, str]] = []
    skipped: Counter[str] = Counter()
    with (
        (folder / "hr.bin").open("wb") as hr_file,
        (folder / "lr.bin").open("wb") as lr_file,
        progress("Reading training images", total=count_images(data), unit="images") as bar,
    ):
        for photo in iter_photos(data):
            bar.advance()
            digest, hr = photo.read_once()
            entries.append((photo.name, digest))
            if isinstance(hr, UnusableImage):
                skipped[hr.what] += 1
                continue
            h, w = hr.shape[0] // scale, hr.shape[1] // scale
            if min(h, w) < lr_patch_px:
                skipped[f"smaller than {lr_patch_px * scale} px"] += 1
                continue
            hr = np.ascontiguousarray(hr[: h * scale, : w * scale])
            with torch.no_grad():
                lr = to_uint8(make_lr(to_float(hr), scale))[0]
            hr_file.write(hr.tobytes())
            lr_file.write(lr.tobytes())
            sizes.append((h, w))
    if not sizes:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "no images"
        raise InputError(
            f"nothing to train on: {reasons}",
            where=data,
            fix=f"use images of at least {lr_patch_px * scale} px, or lower lr_patch_px",
        )
    return {"lr_sizes": sizes, "skipped": dict(skipped), "source": source_digest(entries)}


def _to_device(crops: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(crops)
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return _as_floats(tensor)


def _as_floats(crops: Tensor) -> Tensor:
    """uint8 (N, H, W, C) to float32 (N, C, H, W) in [0, 1], channels-last in memory."""
    return crops.permute(0, 3, 1, 2).float().div_(255)


def _upload(packed: np.ndarray, device: torch.device) -> Tensor:
    """Memory-mapped bytes as ``(pixels, 3)`` on the device, uploaded in parts so that host memory stays flat."""
    pixels = torch.empty(len(packed) // 3, 3, dtype=torch.uint8, device=device)
    flat = pixels.view(-1)
    for start in range(0, len(packed), UPLOAD_BYTES):
        part = np.array(packed[start : start + UPLOAD_BYTES])
        flat[start : start + len(part)] = torch.from_numpy(part).to(device)
    return pixels
