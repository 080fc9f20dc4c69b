"""Reader of the latents stage's artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Latents:
    """Cached latents of the accepted patches, in diffusion units, memory-mapped.

    Attributes:
        patch_ids: in the order of the patches; ``psnr_bic``: antialiased kernel, dB ``float32 (N,)``.
        mean: ``float16 (2, N, C, h, w)``: as they are, mirrored; ``log_variance``: alike, of a KL VAE only.
    """

    patch_ids: list[str]
    psnr_bic: np.ndarray
    mean: np.ndarray
    log_variance: np.ndarray | None


def open_latents(folder: Path) -> Latents:
    """Open a latents artifact without reading the latents."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "patches.parquet")
    variance = folder / "log_variance.npy"
    return Latents(
        patch_ids=table["patch_id"].to_pylist(),
        psnr_bic=table["psnr_bic"].to_numpy(),
        mean=np.load(folder / "mean.npy", mmap_mode="r"),
        log_variance=np.load(variance, mmap_mode="r") if variance.exists() else None,
    )
