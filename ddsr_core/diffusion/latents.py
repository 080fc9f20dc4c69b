"""Stage 3, latents: every accepted patch and its mirror image through the VAE's encoder, once.

The posterior is stored, not a sample of it: fine-tuning samples from it anew in every step, as the authors do, and never
runs the encoder (which costs as much as the DiT's own forward pass).
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ddsr_core.config import Runtime
from ddsr_core.diffusion.base import Base, load_base
from ddsr_core.diffusion.config import LatentsConfig
from ddsr_core.errors import InputError
from ddsr_core.imaging.bicubic import psnr_bic
from ddsr_core.imaging.decode import decode_rgb
from ddsr_core.imaging.image_sets import read_image_parquet
from ddsr_core.imaging.images import to_float, to_signed
from ddsr_core.imaging.kernel import SCALE
from ddsr_core.storage.files import TEMPORARY, allocate, write_atomically, write_json
from ddsr_core.storage.stage import RESUME, Stage, StageResult

MEAN, LOG_VARIANCE, PATCHES = "mean.npy", "log_variance.npy", "patches.parquet"


@dataclass(frozen=True)
class Latents:
    """The posteriors of all patches, memory-mapped: nothing is read before it is used.

    Attributes:
        patch_ids: in the order of the patches.
        psnr_bic: of the patches ``float32 (N,)``, dB, antialiased kernel.
        mean: ``float16 (2, N, C, h, w)``, diffusion units: as they are, then mirrored (the encoder does not commute with
            a flip).
        log_variance: the same shape; None for a VAE without variance.
    """

    patch_ids: list[str]
    psnr_bic: np.ndarray
    mean: np.ndarray
    log_variance: np.ndarray | None


def open_latents(folder: Path) -> Latents:
    """The arrays of a `latents` artifact.

    Raises:
        InputError: ``folder`` holds none.
    """
    if not (folder / PATCHES).is_file() or not (folder / MEAN).is_file():
        raise InputError("there are no latents", where=folder, fix="run the latents stage first")
    table = pq.read_table(folder / PATCHES)
    log_variance = folder / LOG_VARIANCE
    return Latents(
        patch_ids=table["patch_id"].to_pylist(),
        psnr_bic=np.array(table["psnr_bic"].to_numpy()),  # a copy, because torch needs writable memory
        mean=np.load(folder / MEAN, mmap_mode="r"),
        log_variance=np.load(log_variance, mmap_mode="r") if log_variance.is_file() else None,
    )


def run(
    config: LatentsConfig, *, patches: Path, base: Path, out: Path, runtime: Runtime, vae: Path | None = None
) -> StageResult:
    """Encode the patches (layout: ``docs/artifacts.md``). Memory does not grow with their number.

    Args:
        vae: folder of a VAE that replaces the base model's own.

    Raises:
        MissingWeightsError: the base model or the VAE is missing.
        InputError: there are no patches, or their size is not that of the base model's images.
    """
    total = count_patches(patches)
    resume = out / RESUME
    resume.mkdir(parents=True, exist_ok=True)
    journal = _Journal(resume / "done.txt", config.batch_size, total)
    if journal.done < total:
        model = load_base(str(base), runtime.device, vae)
        with runtime.progress("Encoding patches", total=total, unit="patches", done=journal.done) as bar:
            for names, images in batches_of_patches(patches, model.image_px, config.batch_size, start=journal.done):
                mean, log_variance, psnr = encode_both(model, images, runtime.device, config.scale)
                _put(resume / MEAN, mean, journal.done, total)
                if log_variance is not None:
                    _put(resume / LOG_VARIANCE, log_variance, journal.done, total)
                journal.add(names, psnr)
                bar.advance(len(names))
    _write_patches(out / PATCHES, *journal.read())
    for name in (MEAN, LOG_VARIANCE):
        if (resume / name).exists():
            (resume / name).replace(out / name)
    shape = np.load(out / MEAN, mmap_mode="r").shape
    counts = {"patches": total, "latent": list(shape[2:]), "variational": (out / LOG_VARIANCE).exists()}
    write_json(out / "summary.json", counts)
    return StageResult(counts)


@torch.inference_mode()
def encode_both(
    model: Base, images: np.ndarray, device: str, scale: int = SCALE
) -> tuple[np.ndarray, np.ndarray | None, list[float]]:
    """Encode ``uint8 (B, H, W, 3)`` and their mirror images.

    Returns:
        Posterior mean and log variance ``float16 (2, B, C, h, w)`` (None for a VAE without variance), and PSNR_bic, dB.
    """
    x = to_float(images).to(device)
    plain, mirrored = (model.codec.moments(to_signed(view)) for view in (x, x.flip(3)))
    mean = _as_half(plain[0], mirrored[0])
    log_variance = None
    if plain[1] is not None and mirrored[1] is not None:
        log_variance = _as_half(plain[1], mirrored[1])
    return mean, log_variance, psnr_bic(x, scale=scale).cpu().tolist()


def _as_half(plain: Tensor, mirrored: Tensor) -> np.ndarray:
    return np.stack([np.asarray(values.half().cpu().numpy()) for values in (plain, mirrored)])


class _Journal:
    """One line for each patch whose latents are on disk, written after them, so that a kill costs at most one batch."""

    def __init__(self, path: Path, batch_size: int, total: int) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()  # the last one may have been truncated
        # Complete batches only: a batch of another size rounds differently in the last bit.
        complete = len(lines) if len(lines) == total else len(lines) // batch_size * batch_size
        write_atomically(path, "".join(f"{line}\n" for line in lines[:complete]).encode())
        self.done = complete

    def add(self, names: list[str], psnr: list[float]) -> None:
        with self.path.open("a") as file:
            file.writelines(f"{value!r} {name}\n" for name, value in zip(names, psnr, strict=True))
        self.done += len(names)

    def read(self) -> tuple[list[str], list[float]]:
        pairs = [line.split(" ", 1) for line in self.path.read_text().splitlines()]
        return [name for _, name in pairs], [float(value) for value, _ in pairs]


def _put(path: Path, values: np.ndarray, start: int, total: int) -> None:
    """Write ``values (2, B, …)`` at patch ``start`` of the array file, which is created at its full size."""
    if not path.exists():
        _allocate(path, (2, total, *values.shape[2:]))
    array = np.lib.format.open_memmap(path, mode="r+")
    array[:, start : start + values.shape[1]] = values
    array.flush()


def _allocate(path: Path, shape: tuple[int, ...]) -> None:
    """Create an array file of float16 zeros with all its disk space.

    A sparse file would end the process (SIGBUS) as soon as the disk is full; here that is an OSError.
    """
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False, "shape": shape}
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        allocate(file, file.tell() + 2 * math.prod(shape))
    temporary.replace(path)


def _write_patches(path: Path, names: list[str], psnr: list[float]) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"patch_id": names, "psnr_bic": np.array(psnr, np.float32)}), buffer)
    write_atomically(path, buffer.getvalue())


def count_patches(patches: Path) -> int:
    """Number of accepted patches.

    Raises:
        InputError: there are none.
    """
    total = sum(int(pq.ParquetFile(file).metadata.num_rows) for file in patches.glob("patches-*.parquet"))
    if not total:
        raise InputError("there are no patches", where=patches, fix="run the patches stage first")
    return total


def batches_of_patches(
    patches: Path, image_px: int, size: int = 16, start: int = 0
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Ids and pixels ``uint8 (n, H, W, 3)`` of the accepted patches from the ``start``-th on, ``size`` at a time.

    Raises:
        InputError: the size of a patch is not ``image_px``.
    """
    names: list[str] = []
    images: list[np.ndarray] = []
    for position, row in enumerate(read_image_parquet(patches, ["image", "patch_id"])):
        if position < start:
            continue
        image = decode_rgb(row["image"]["bytes"], row["patch_id"])
        if image.shape[:2] != (image_px, image_px):
            raise InputError(
                f"the base makes images of {image_px}x{image_px}, the patches are {image.shape[1]}x{image.shape[0]}",
                where="patches.patch_px",
                fix=f"set patches.patch_px={image_px}, or choose another base",
            )
        names.append(row["patch_id"])
        images.append(image)
        if len(names) == size:
            yield names, np.stack(images)
            names, images = [], []
    if names:
        yield names, np.stack(images)


STAGE = Stage(
    "latents", version=1, run=run, config=LatentsConfig, section="II-B", on_gpu=True, words="latents of {patches:,} patches"
)
