"""Training patches of a base model: textured windows of a folder of photographs, at several scales.

A tenth of the photos is held out, chosen by file name, so that scores are measured on photos that were never seen.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ddsr_core.errors import InputError
from ddsr_core.imaging.decode import UnusableImage
from ddsr_core.imaging.photos import Photo, iter_photos
from ddsr_core.pretrain.config import PretrainConfig
from ddsr_core.progress import ProgressFactory, silent
from ddsr_core.pseudo_labels.config import PatchesConfig
from ddsr_core.pseudo_labels.windows import score_windows


@dataclass(frozen=True)
class PatchSet:
    """Patches cut out of the photos.

    Attributes:
        train: ``uint8 (N, px, px, 3)``.
        held_out: the same of other photos.
        threshold_db: PSNR_bic that a window had to be below.
        photos: number of photos with at least one window, training and held out.
        skipped: number of photos that cannot be used, by reason.
    """

    train: np.ndarray
    held_out: np.ndarray
    threshold_db: float
    photos: tuple[int, int]
    skipped: dict[str, int]


@dataclass(frozen=True)
class _Windows:
    """Candidate windows of one photo with their PSNR_bic."""

    pixels: np.ndarray
    psnr_bic: np.ndarray
    held_out: bool


def scaled_copies(image: np.ndarray, config: PretrainConfig) -> Iterator[np.ndarray]:
    """The photo at up to ``config.scales`` sizes, each at least ``least_reduction`` times smaller than the original."""
    height, width = image.shape[:2]
    short = min(height, width)
    side = min(float(config.largest_short_side_px), short / config.least_reduction)
    for _ in range(config.scales):
        if side < max(config.smallest_short_side_px, config.image_px):
            return
        size = (max(config.image_px, round(width * side / short)), max(config.image_px, round(height * side / short)))
        yield np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
        side *= config.scale_step


def is_held_out(name: str, share: float) -> bool:
    """Whether a photo belongs to the held-out ones: decided by its file name alone (fetched ones are named by content)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < share * 2**32


def cut_patches(folder: Path, config: PretrainConfig, progress: ProgressFactory = silent) -> PatchSet:
    """Cut the textured windows of every photo: the share ``keep_share`` of them with the lowest PSNR_bic.

    Photos that cannot be read are left out and counted.

    Raises:
        InputError: no window is left for training or for the scores.
    """
    photos = list(iter_photos(folder))
    cut, skipped = _cut_all(photos, config, progress)
    scores = np.concatenate([windows.psnr_bic for windows in cut]) if cut else np.empty(0)
    if not len(scores):
        raise InputError(
            f"none of {len(photos)} photos is large enough"
            + (f" ({sum(skipped.values())} cannot be read)" if skipped else ""),
            where=folder,
            fix=f"use photos of at least {config.smallest_short_side_px * config.least_reduction:.0f} px on their short "
            "side, or lower smallest_short_side_px",
        )
    threshold = float(np.quantile(scores, config.keep_share))
    parts = [_chosen(cut, threshold, held, config) for held in (False, True)]
    for part, what in zip(parts, ("training", "held-out"), strict=True):
        if not len(part):
            raise InputError(
                f"the {what} photos have no window with a PSNR_bic below {threshold:.1f} dB",
                where=folder,
                fix="add photos, raise keep_share, or change held_out_share",
            )
    counts = tuple(
        sum(windows.held_out == held and bool((windows.psnr_bic <= threshold).any()) for windows in cut)
        for held in (False, True)
    )
    return PatchSet(parts[0], parts[1], threshold, (counts[0], counts[1]), dict(sorted(skipped.items())))


def _cut_all(photos: list[Photo], config: PretrainConfig, progress: ProgressFactory) -> tuple[list[_Windows], Counter[str]]:
    """The windows of every photo that can be read, and how many cannot, by reason."""
    cut: list[_Windows] = []
    skipped: Counter[str] = Counter()
    with progress("Cutting patches", total=len(photos), unit="photos") as bar:
        for number, photo in enumerate(photos):
            try:
                pixels = photo.read()
            except UnusableImage as error:
                skipped[error.reason.split(":")[0]] += 1
            else:
                held_out = is_held_out(Path(photo.name).name, config.held_out_share)
                cut.append(_windows(pixels, held_out, config, np.random.default_rng((config.seed, number))))
            bar.advance()
    return cut, skipped


def _windows(image: np.ndarray, held_out: bool, config: PretrainConfig, rng: np.random.Generator) -> _Windows:
    """At most ``most_per_photo`` windows of a photo, sampled from all of its copies."""
    rule = PatchesConfig(patch_px=config.image_px, stride_px=config.stride_px)
    copies = list(scaled_copies(image, config))
    scored = [score_windows(copy, rule) for copy in copies]
    places = [(index, k) for index, windows in enumerate(scored) for k in range(len(windows.psnr_bic))]
    chosen = sorted(rng.permutation(len(places))[: config.most_per_photo])
    pixels, psnr = [], []
    for index, k in (places[i] for i in chosen):
        y, x = int(scored[index].y[k]), int(scored[index].x[k])
        pixels.append(copies[index][y : y + config.image_px, x : x + config.image_px])
        psnr.append(scored[index].psnr_bic[k])
    shape = (0, config.image_px, config.image_px, 3)
    return _Windows(np.stack(pixels) if pixels else np.empty(shape, np.uint8), np.array(psnr, np.float32), held_out)


def _chosen(cut: list[_Windows], threshold: float, held_out: bool, config: PretrainConfig) -> np.ndarray:
    most = config.held_out_patches if held_out else config.most_patches
    kept = [windows.pixels[windows.psnr_bic <= threshold] for windows in cut if windows.held_out == held_out]
    count = sum(len(part) for part in kept)
    if not count:
        return np.empty((0, config.image_px, config.image_px, 3), np.uint8)
    order = np.random.default_rng(config.seed).permutation(count)[:most]
    return np.concatenate(kept)[order]
