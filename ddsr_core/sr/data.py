"""Training pairs: every image decoded once, its LR made once, both packed as raw bytes; crops are slices of those.

The LR of a crop is cut from the LR of the whole image, so that it is right up to the crop's border. Crop number i of
step t depends on (seed, t, i) alone: a run can continue at any step, and every source of data sees the same draws.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddsr_core import images
from ddsr_core.errors import InputError
from ddsr_core.progress import ProgressFactory, silent
from ddsr_core.store import write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Packed HR and LR images.

    Attributes:
        hr, lr: uint8, the images' (height, width, 3) arrays one after the other; on disk, mapped.
        lr_sizes: (n, 2) int64, height and width of each LR; HR is ``scale`` times that.
        scale: upsampling factor.
        lr_patch_px: height and width of the LR crops.
        skipped: number of images left out, by reason.
    """

    hr: np.ndarray
    lr: np.ndarray
    lr_sizes: np.ndarray
    scale: int
    lr_patch_px: int
    skipped: dict[str, int]

    def __len__(self) -> int:
        return len(self.lr_sizes)

    @cached_property
    def ends(self) -> np.ndarray:
        """(n,) LR pixels up to the end of each image."""
        return np.cumsum(self.lr_sizes.prod(axis=1))

    @property
    def hr_pixels(self) -> int:
        return int(self.ends[-1]) * self.scale**2

    def image(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """LR ``(h, w, 3)`` and HR ``(scale h, scale w, 3)`` of one image, uint8, without a copy."""
        (h, w), s = self.lr_sizes[index], self.scale
        end = self.ends[index] * 3
        start = end - h * w * 3
        return self.lr[start:end].reshape(h, w, 3), self.hr[start * s**2 : end * s**2].reshape(h * s, w * s, 3)

    def crops(self, seed: int, step: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Random crops, each flipped or turned in one of 8 ways, as uint8 ``(batch, p, p, 3)`` LR and HR.

        An image is drawn in proportion to its area, then a place in it; places are whole LR pixels.
        """
        generator = np.random.default_rng([seed, step])
        chosen = np.searchsorted(self.ends, generator.integers(self.ends[-1], size=batch), side="right")
        corners = generator.random((batch, 2))
        turns = generator.integers(8, size=batch)
        p, s = self.lr_patch_px, self.scale
        lr_out = np.empty((batch, p, p, 3), np.uint8)
        hr_out = np.empty((batch, p * s, p * s, 3), np.uint8)
        for i, index in enumerate(chosen):
            lr, hr = self.image(index)
            y, x = (corners[i] * (self.lr_sizes[index] - p + 1)).astype(int)
            lr_out[i] = turned(lr[y : y + p, x : x + p], turns[i])
            hr_out[i] = turned(hr[y * s : (y + p) * s, x * s : (x + p) * s], turns[i])
        return lr_out, hr_out

    def batch(self, seed: int, step: int, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """`crops` as float32 ``(batch, 3, p, p)`` in [0, 1], channels-last, on the device."""
        lr, hr = self.crops(seed, step, batch)
        return _to_device(lr, device), _to_device(hr, device)


def turned(crop: np.ndarray, turn: int) -> np.ndarray:
    """One of the 8 symmetries of the square: ``turn % 4`` quarter turns, mirrored for ``turn >= 4``."""
    crop = np.rot90(crop, turn % 4)
    return crop[:, ::-1] if turn >= 4 else crop


def pack_pairs(data: Path, folder: Path, lr_patch_px: int, scale: int = 4, progress: ProgressFactory = silent) -> Pairs:
    """Decode every image of ``data`` once and map the packed pairs from ``folder``; a finished packing is used again.

    Images are cut to a multiple of ``scale`` at the bottom and right. Those that cannot be read or are smaller than a
    crop are left out and counted.

    Raises:
        InputError: nothing is left.
    """
    index = folder / "index.json"
    if not index.exists():
        folder.mkdir(parents=True, exist_ok=True)
        sizes, skipped = _pack(data, folder, lr_patch_px, scale, progress)
        write_json(index, {"lr_sizes": sizes, "skipped": skipped})  # last: its presence says that the rest is whole
    facts = json.loads(index.read_text())
    return Pairs(
        hr=np.memmap(folder / "hr.bin", np.uint8, "r"),
        lr=np.memmap(folder / "lr.bin", np.uint8, "r"),
        lr_sizes=np.array(facts["lr_sizes"], np.int64).reshape(-1, 2),
        scale=scale,
        lr_patch_px=lr_patch_px,
        skipped=facts["skipped"],
    )


def count_images(data: Path) -> int:
    """How many images `images.iter_photos` will yield from a folder or Parquet, without reading them.

    Raises:
        InputError: nothing is there, or a Parquet file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = images.find_images(data)
    if files:
        return len(files)
    shards = sorted(data.glob("*.parquet")) if data.is_dir() else [data]
    try:
        readers = [pq.ParquetFile(shard) for shard in shards if shard.suffix == ".parquet"]
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError("not a readable Parquet file", where=data, mend=str(error)) from error
    return sum(reader.metadata.num_rows for reader in readers if "image" in reader.schema_arrow.names)


def _pack(
    data: Path, folder: Path, lr_patch_px: int, scale: int, progress: ProgressFactory
) -> tuple[list[tuple[int, int]], dict[str, int]]:
    import torch

    from ddsr_core.bicubic import make_lr

    sizes: list[tuple[int, int]] = []
    skipped: Counter[str] = Counter()
    with (
        (folder / "hr.bin").open("wb") as hr_file,
        (folder / "lr.bin").open("wb") as lr_file,
        progress("Reading training images", total=count_images(data), unit="images") as bar,
    ):
        for photo in images.iter_photos(data):
            bar.advance()
            try:
                hr = photo.read()
            except InputError as error:
                skipped[error.what] += 1
                continue
            h, w = hr.shape[0] // scale, hr.shape[1] // scale
            if min(h, w) < lr_patch_px:
                skipped[f"smaller than {lr_patch_px * scale} px"] += 1
                continue
            hr = np.ascontiguousarray(hr[: h * scale, : w * scale])
            with torch.no_grad():
                lr = images.to_uint8(make_lr(images.to_float(hr), scale))[0]
            hr_file.write(hr.tobytes())
            lr_file.write(lr.tobytes())
            sizes.append((h, w))
    if not sizes:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "no images"
        raise InputError(
            f"nothing to train on: {reasons}",
            where=data,
            mend=f"bring images of at least {lr_patch_px * scale} px, or lower lr_patch_px",
        )
    return sizes, dict(skipped)


def _to_device(crops: np.ndarray, device: torch.device) -> Tensor:
    import torch

    tensor = torch.from_numpy(crops)
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor.permute(0, 3, 1, 2).float().div_(255)  # NHWC in memory: channels-last as it is
