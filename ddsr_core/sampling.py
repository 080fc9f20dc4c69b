"""Stage 5, sampling: draw the distilled data set from the fine-tuned model (paper, II-C).

Over-sample and select: of ``oversample`` candidates an image is kept so that the PSNR_bic of each pseudo-label follows
that of its real patches. Never the lowest: those are the artefacts.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from ddsr_core.config import Runtime, StageConfig
from ddsr_core.errors import InputError
from ddsr_core.images import encode_png, finish_image_set, image_set_name, to_float, to_uint8
from ddsr_core.store import RESUME, Stage, StageResult, write_atomically, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from ddsr_core.diffusion.base import Base

THUMBNAIL_PX = 32
COMPARE_BATCH = 32


class SampleConfig(StageConfig):
    """How many images, and how they are drawn and chosen."""

    count: int = Field(70, ge=1, le=100_000, description="images of the distilled set")
    sampler: Literal["ancestral", "dpmpp", "unipc"] = Field("dpmpp", description="ancestral is what was released")
    steps: int = Field(25, ge=2, le=1000, description="sampling steps")
    guidance_scale: float = Field(1.0, ge=0, le=20, description="classifier-free guidance; more of it smooths texture away")
    guided_channels: Literal[3, 4] = Field(3, description="latent channels under guidance; 3 as released")
    weights: Literal["ema", "raw"] = Field("ema", description="averaged or last adapter weights")
    oversample: int = Field(4, ge=1, le=64, description="candidates an image; 1 keeps every sample")
    max_cosine: float = Field(
        0.98, gt=0, le=1, description="candidates more similar than this to a training patch are refused; 1 keeps all"
    )
    batch_size: int = Field(16, ge=1, le=4096, description="images a forward pass")
    precision: Literal["bf16", "fp32"] = Field("fp32", description="of the networks; the solver's steps are float32")
    seed: int = Field(0, ge=0, description="of the noise")


@dataclass(frozen=True)
class Comparison:
    """Candidates and accepted patches side by side.

    Attributes:
        psnr_bic: of the candidates, dB ``(n,)``; antialiased kernel, here and below.
        nearest: id of the patch that each candidate is most similar to; ``cosine``: how similar ``(n,)``.
        real_psnr_bic: of the accepted patches, dB ``(N,)``; ``real_labels``: their pseudo-labels ``(N,)``.
    """

    psnr_bic: np.ndarray
    nearest: list[str]
    cosine: np.ndarray
    real_psnr_bic: np.ndarray
    real_labels: np.ndarray


def images_per_label(count: int, sizes: list[int]) -> list[int]:
    """Equal shares; what is left over goes to the largest clusters (ties: the lower label).

    >>> images_per_label(10, [5, 9, 9])
    [3, 4, 3]
    """
    shares = [count // len(sizes)] * len(sizes)
    for label in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))[: count % len(sizes)]:
        shares[label] += 1
    return shares


def thumbnail_vectors(images: Tensor) -> np.ndarray:
    """What similarity to training patches is measured on: 32-px thumbnails, mean removed, of length 1.

    Args:
        images: ``float (B, 3, H, W)`` in [0, 1].

    Returns:
        ``float32 (B, 3072)``; the dot product of two is their cosine similarity, 1 for a copy.
    """
    import torch.nn.functional as F

    small = F.interpolate(images, size=(THUMBNAIL_PX, THUMBNAIL_PX), mode="area").flatten(1)
    return F.normalize(small - small.mean(1, keepdim=True), dim=1).cpu().numpy()


def choose(psnr: np.ndarray, target: np.ndarray, refused: np.ndarray, count: int) -> np.ndarray:
    """Pick ``count`` candidates whose PSNR_bic follows the distribution of ``target``.

    The quantiles (i + 1/2) / count of ``target`` are matched one to one with candidates at the least total distance.

    Args:
        psnr: of the candidates, dB ``(n,)``, n >= count; ``target``: of the real patches ``(m,)``.
        refused: candidates to take only if nothing else is left ``(n,)`` bool.

    Returns:
        Indices of candidates, ascending ``(count,)``.
    """
    from scipy.optimize import linear_sum_assignment

    wanted = np.quantile(target, (np.arange(count) + 0.5) / count)
    cost = np.abs(wanted[:, None] - psnr[None, :]) + 1e6 * refused[None, :]
    return np.sort(linear_sum_assignment(cost)[1])


def run(
    config: SampleConfig,
    *,
    adapter: Path,
    base: Path,
    clusters: Path,
    patches: Path,
    out: Path,
    runtime: Runtime,
    vae: Path | None = None,
) -> StageResult:
    """Draw the candidates, choose among them and write the distilled set.

    Raises:
        InputError: the adapter does not belong to the base; or too many candidates copy training patches.
    """
    sizes = json.loads((clusters / "summary.json").read_text())["sizes"]
    shares = images_per_label(config.count, sizes)
    labels = np.repeat(np.arange(len(shares)), [share * config.oversample for share in shares])
    draw_candidates(config, labels, adapter, base, out, runtime)
    compared = compare(len(labels), patches, clusters, out, runtime)
    rows: list[dict[str, Any]] = []
    for label, share in enumerate(shares):
        rows += _chosen_of_label(config, label, np.flatnonzero(labels == label), share, compared)
    for index, row in enumerate(rows):
        write_atomically(out / image_set_name(index), _candidate(out, row.pop("candidate")).read_bytes())
    _write_set(out, rows)
    summary = _summary(config, rows, compared.real_psnr_bic, out)
    write_json(out / "summary.json", summary)
    counted = ("count", "height", "width", "psnr_bic_mean", "psnr_bic_real_mean", "max_cosine_to_train")
    return StageResult({name: summary[name] for name in counted})


def draw_candidates(
    config: SampleConfig, labels: np.ndarray, adapter: Path, base: Path, out: Path, runtime: Runtime
) -> None:
    """Write candidate ``i`` of pseudo-label ``labels[i]`` to ``out/resume/candidates``; those that are there stay."""
    (out / RESUME / "candidates").mkdir(parents=True, exist_ok=True)
    # Whole batches, always the same ones: a batch of another size rounds differently in the last bit.
    batches = [
        list(range(start, min(start + config.batch_size, len(labels)))) for start in range(0, len(labels), config.batch_size)
    ]
    todo = [batch for batch in batches if not all(_candidate(out, index).exists() for index in batch)]
    if not todo:
        return
    model, label_map = load_tuned(adapter, base, config.weights, runtime.device)
    if unknown := sorted(set(labels.tolist()) - set(label_map)):
        raise InputError(
            f"the adapter does not know the pseudo-labels {unknown}",
            where=adapter,
            mend="give the clusters that it was fine-tuned on",
        )
    done = len(labels) - sum(map(len, todo))
    with runtime.progress("Sampling", total=len(labels), unit="images", done=done) as bar:
        for batch in todo:
            images = _draw(config, model, [label_map[int(labels[index])] for index in batch], batch, runtime.device)
            for index, image in zip(batch, images, strict=True):
                write_atomically(_candidate(out, index), encode_png(image))
            bar.advance(len(batch))


def load_tuned(adapter: Path, base: Path, weights: str, device: str) -> tuple[Base, dict[int, int]]:
    """The base with the adapter folded into it, and pseudo-label -> row of the class table."""
    from ddsr_core.diffusion.base import load_base
    from ddsr_core.diffusion.difffit import fold, load_adapter

    model = load_base(str(base), device)
    tuned = load_adapter(adapter, weights)
    tuned.apply(model.dit, model.digest)
    fold(model.dit)
    model.dit.requires_grad_(False)
    return model, tuned.label_map


def _draw(config: SampleConfig, model: Base, rows: list[int], indices: list[int], device: str) -> np.ndarray:
    import torch

    from ddsr_core.diffusion.samplers import sample_latents
    from ddsr_core.images import from_signed

    half = config.precision == "bf16"
    with torch.inference_mode(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
        latents = sample_latents(
            model.dit, torch.tensor(rows, device=device), indices, seed=config.seed, sampler=config.sampler,
            steps=config.steps, guidance_scale=config.guidance_scale, guided_channels=config.guided_channels,
        )  # fmt: skip
        return to_uint8(from_signed(model.decode(latents).float()))


def _candidate(out: Path, index: int) -> Path:
    return out / RESUME / "candidates" / f"{index:08d}.png"


def compare(count: int, patches: Path, clusters: Path, out: Path, runtime: Runtime) -> Comparison:
    """PSNR_bic of candidates and patches, and for each candidate the patch it is most similar to, mirrored or not.

    Patches pass by a batch at a time: memory does not grow with their number.
    """
    from ddsr_core.bicubic import psnr_bic
    from ddsr_core.clusters import read_labels
    from ddsr_core.diffusion.training_set import label_of
    from ddsr_core.images import read_rgb
    from ddsr_core.latents import batches_of_patches

    psnr: list[float] = []
    vectors: list[np.ndarray] = []
    mirrored: list[np.ndarray] = []
    for start in range(0, count, COMPARE_BATCH):
        paths = [_candidate(out, index) for index in range(start, min(start + COMPARE_BATCH, count))]
        images = to_float(np.stack([read_rgb(path) for path in paths]))
        psnr += psnr_bic(images).tolist()
        vectors.append(thumbnail_vectors(images))
        mirrored.append(thumbnail_vectors(images.flip(3)))
    both = np.stack([np.concatenate(vectors), np.concatenate(mirrored)])  # (2, n, d)

    of_patch = read_labels(clusters)
    best, nearest = np.full(count, -1.0, np.float32), [""] * count
    real_psnr: list[float] = []
    real_labels: list[int] = []
    side = images.shape[-1]
    with runtime.progress("Comparing with real patches", total=len(of_patch), unit="patches") as bar:
        for names, pixels in batches_of_patches(patches, side):
            real = to_float(pixels)
            real_psnr += psnr_bic(real).tolist()
            real_labels += [label_of(of_patch, name) for name in names]
            cosine = (both @ thumbnail_vectors(real).T).max(0)  # (n, batch)
            winner = cosine.argmax(1)
            for index in np.flatnonzero(cosine.max(1) > best):
                best[index], nearest[index] = cosine[index, winner[index]], names[winner[index]]
            bar.advance(len(names))
    return Comparison(np.array(psnr), nearest, best, np.array(real_psnr), np.array(real_labels))


def _chosen_of_label(
    config: SampleConfig, label: int, candidates: np.ndarray, share: int, compared: Comparison
) -> list[dict[str, Any]]:
    if not share:
        return []
    refused = compared.cosine[candidates] > config.max_cosine
    if (~refused).sum() < share:
        raise InputError(
            f"{int(refused.sum())} of {len(candidates)} samples of pseudo-label {label} copy training patches "
            f"(cosine above {config.max_cosine})",
            where="sample.max_cosine",
            mend="raise sample.oversample, fine-tune for fewer steps, or raise sample.max_cosine",
        )
    target = compared.real_psnr_bic[compared.real_labels == label]
    kept = candidates[choose(compared.psnr_bic[candidates], target, refused, share)]
    return [
        {
            "candidate": int(index), "pseudo_label": label, "seed": config.seed, "index": int(index),
            "psnr_bic": round(float(compared.psnr_bic[index]), 4), "nearest_patch_id": compared.nearest[index],
            "max_cosine_to_train": round(float(compared.cosine[index]), 5),
        }
        for index in kept
    ]  # fmt: skip


def _write_set(out: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa

    fields = {
        "pseudo_label": pa.int32(), "seed": pa.int64(), "index": pa.int64(), "psnr_bic": pa.float64(),
        "nearest_patch_id": pa.string(), "max_cosine_to_train": pa.float64(),
    }  # fmt: skip
    finish_image_set(out, rows, fields)


def _summary(config: SampleConfig, rows: list[dict[str, Any]], real_psnr: np.ndarray, out: Path) -> dict[str, Any]:
    from PIL import Image

    psnr = np.array([row["psnr_bic"] for row in rows])
    labels = np.array([row["pseudo_label"] for row in rows])
    with Image.open(io.BytesIO((out / image_set_name(0)).read_bytes())) as first:
        width, height = first.size
    return {
        "count": len(rows),
        "height": height,
        "width": width,
        "candidates": config.count * config.oversample,
        "psnr_bic_mean": round(float(psnr.mean()), 4),
        "psnr_bic_real_mean": round(float(real_psnr.mean()), 4),
        "psnr_bic_by_label": {str(label): round(float(psnr[labels == label].mean()), 4) for label in np.unique(labels)},
        "max_cosine_to_train": max(row["max_cosine_to_train"] for row in rows),
    }


STAGE = Stage("sample", version=1, run=run)
