"""Stage 5, sampling: draw the distilled data set from the fine-tuned model (paper, II-C).

Over-sample and select: `draw_candidates` makes ``oversample`` candidates an image, `ddsr_core.sampling.selection` compares
them with the real patches, and of each pseudo-label those are kept that stand for its patches and copy none of them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from ddsr_core.config import Runtime, StageConfig
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.imaging.image_sets import finish_image_set, image_set_name
from ddsr_core.imaging.images import encode_png
from ddsr_core.sampling.real_starts import StartLatents, StartOrder, starting_patches
from ddsr_core.sampling.restoration import restored_files
from ddsr_core.sampling.selection import Comparison, Scores, Select, choose, compare, random_score, score
from ddsr_core.sampling.sr_gain import gains_of_files, most_learnable
from ddsr_core.storage.files import write_atomically, write_json
from ddsr_core.storage.stage import RESUME, Stage, StageResult

if TYPE_CHECKING:
    from torch import Tensor

    from ddsr_core.diffusion.base import Base

Timestep = Annotated[float, Field(ge=0, le=999)]


class SampleConfig(StageConfig):
    """How many images, and how they are drawn and chosen."""

    count: int = Field(70, ge=1, le=100_000, description="images of the distilled set")
    allocation: Literal["equal", "proportional"] = Field(
        "equal", description="images of each pseudo-label: equal shares, or proportional to its patches"
    )
    sampler: Literal["ancestral", "dpmpp", "unipc"] = Field("dpmpp", description="ancestral is what was released")
    steps: int = Field(25, ge=2, le=1000, description="sampling steps")
    guidance_scale: float = Field(1.0, ge=0, le=20, description="classifier-free guidance; more of it smooths texture away")
    guided_channels: Literal[3, 4] = Field(3, description="latent channels under guidance; 3 as released")
    guidance_interval: tuple[Timestep, Timestep] = Field(
        (0, 999), description="guidance only from the first to the second t (0 is clean); elsewhere half the cost"
    )
    strength: float = Field(
        1.0,
        gt=0,
        le=1,
        description="1 begins at pure noise; less begins at real patches, noised to strength * 1000: nearer to the data, "
        "and nearer to copies of it",
    )
    start: StartOrder = Field(
        "medoids",
        description="which patches of a cluster a strength below 1 begins at: those nearest to its centroid, or those "
        "spread over it (k-center)",
    )
    weights: Literal["ema", "raw"] = Field("ema", description="averaged or last adapter weights")
    oversample: int = Field(4, ge=1, le=64, description="candidates an image; 1 keeps every sample")
    select: Select = Field(
        "psnr_bic_and_coverage",
        description="what the choice among candidates follows: nothing, the PSNR_bic of the real patches, or that and "
        "how well the chosen cover the real patches in embedding space",
    )
    sr_gain_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the candidates that is left to choose from: those whose detail a small SR network, trained on "
        "the accepted patches, restores best; 1: off",
    )
    detail_restoration: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the chosen images' detail that is replaced by what the same network restores from their LR "
        "images: 1 leaves only detail that can be learned; 0: off",
    )
    max_cosine: float = Field(
        0.98, gt=0, le=1, description="candidates more similar than this to a training patch, by pixels, are refused; 1: off"
    )
    max_embedding_cosine: float = Field(
        1.0,
        gt=0,
        le=1,
        description="the same by embedding; 1: off, as what is usual depends on the network and the patches (vgg16 at "
        "64 px: different real patches reach 0.95 among themselves)",
    )
    batch_size: int = Field(16, ge=1, le=4096, description="images a forward pass")
    decode_tile_px: int | None = Field(
        None, ge=32, description="decode in tiles of this side, approximately, to save memory; null: whole images"
    )
    precision: Literal["bf16", "fp32"] = Field("fp32", description="of the networks; the solver's steps are float32")
    seed: int = Field(0, ge=0, description="of the noise")

    @model_validator(mode="after")
    def _interval_rises(self) -> SampleConfig:
        if self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError("guidance_interval must be (lowest t, highest t)")
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether an SR network trained on the accepted patches takes part."""
        return self.sr_gain_share < 1 or self.detail_restoration > 0


def images_per_label(count: int, sizes: list[int], allocation: Literal["equal", "proportional"] = "equal") -> list[int]:
    """Shares, equal or proportional to ``sizes`` (rounded down); what is left over goes to the largest clusters.

    Of equally large clusters the lower label comes first.

    >>> images_per_label(10, [5, 9, 9])
    [3, 4, 3]
    >>> images_per_label(10, [30, 60, 10], "proportional")
    [3, 6, 1]
    """
    parts = [1] * len(sizes) if allocation == "equal" else sizes
    shares = [count * part // sum(parts) for part in parts]
    for label in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))[: count - sum(shares)]:
        shares[label] += 1
    return shares


def run(
    config: SampleConfig,
    *,
    adapter: Path,
    base: Path,
    clusters: Path,
    patches: Path,
    embeddings: Path,
    out: Path,
    runtime: Runtime,
    weights: Path | None = None,
    vae: Path | None = None,
    latents: Path | None = None,
    teacher: Path | None = None,
) -> StageResult:
    """Draw the candidates, choose among them and write the distilled set.

    Args:
        weights: open_clip weights file, where the embeddings were made with one.
        vae: VAE to use in place of the base's own.
        latents: artifact of the latents stage, wanted where ``strength`` is below 1.
        teacher: artifact of the train_sr stage, wanted where ``sr_gain_share`` is below 1 or ``detail_restoration`` above 0.

    Raises:
        ConfigError: ``teacher`` is wanted and not given.
        InputError: the artifacts do not belong together; or too many candidates copy training patches.
    """
    sizes = json.loads((clusters / "summary.json").read_text())["sizes"]
    shares = images_per_label(config.count, sizes, config.allocation)
    labels = np.repeat(np.arange(len(shares)), [share * config.oversample for share in shares])
    check_teacher(config, teacher)
    starts = starting_patches(labels, clusters, config.start) if config.strength < 1 else None
    draw_candidates(config, labels, starts, adapter, base, vae, latents, out, runtime)
    paths = [_candidate(out, index) for index in range(len(labels))]
    compared = compare(paths, patches, clusters, embeddings, weights, runtime)
    gains = gains_of_files(teacher, paths, runtime) if teacher and config.sr_gain_share < 1 else None
    chosen: list[int] = []
    scores: list[tuple[int, Scores, Scores]] = []
    for label, share in enumerate(shares):
        if share:
            candidates = np.flatnonzero(labels == label)
            kept, reached, by_chance = _choose_of_label(config, label, candidates, share, compared, gains)
            chosen += kept
            scores.append((share, reached, by_chance))
    written = write_chosen(config, [paths[index] for index in chosen], teacher, out, runtime)
    of_row = list(chosen)
    final = compared
    if config.detail_restoration > 0:  # they are no longer what was drawn
        final, of_row = compare(written, patches, clusters, embeddings, weights, runtime), list(range(len(written)))
    rows = [
        _row(config, index, int(labels[index]), starts, final, place, gains)
        for index, place in zip(chosen, of_row, strict=True)
    ]
    _write_set(out, rows)
    summary = _summary(config, rows, compared, scores, out)
    write_json(out / "summary.json", summary)
    counted = ("count", "height", "width", "psnr_bic_mean", "psnr_bic_real_mean", "max_cosine_to_train", "coverage")
    return StageResult({name: summary[name] for name in counted})


def draw_candidates(
    config: SampleConfig,
    labels: np.ndarray,
    starts: list[str] | None,
    adapter: Path,
    base: Path,
    vae: Path | None,
    latents: Path | None,
    out: Path,
    runtime: Runtime,
) -> None:
    """Write candidate ``i`` of pseudo-label ``labels[i]`` to ``out/resume/candidates``; those that are there stay.

    Args:
        starts: patch that each candidate begins at; None for pure noise.

    Raises:
        InputError: adapter, base, clusters and latents do not belong together.
    """
    (out / RESUME / "candidates").mkdir(parents=True, exist_ok=True)
    # Whole batches, always the same ones: a batch of another size rounds differently in the last bit. A run that was
    # cut off draws the batch again that it was in, and writes only the images of it that were missing.
    batches = [
        list(range(start, min(start + config.batch_size, len(labels)))) for start in range(0, len(labels), config.batch_size)
    ]
    todo = [batch for batch in batches if not all(_candidate(out, index).exists() for index in batch)]
    if not todo:
        return
    model, label_map = load_tuned(adapter, base, config.weights, runtime.device, vae)
    if unknown := sorted(set(labels.tolist()) - set(label_map)):
        raise InputError(
            f"the adapter does not know the pseudo-labels {unknown}",
            where=adapter,
            fix="give the clusters that it was fine-tuned on",
        )
    begin = StartLatents(model, latents) if starts else None
    done = len(labels) - sum(map(len, todo))
    with runtime.progress("Sampling", total=len(labels), unit="images", done=done) as bar:
        for batch in todo:
            start = begin.of([starts[index] for index in batch]) if begin and starts else None
            images = _draw(config, model, [label_map[int(labels[index])] for index in batch], batch, start)
            for index, image in zip(batch, images, strict=True):
                if not _candidate(out, index).exists():
                    write_atomically(_candidate(out, index), encode_png(image))
            bar.advance(len(batch))


def load_tuned(
    adapter: Path, base: Path, weights: Literal["ema", "raw"], device: str, vae: Path | None = None
) -> tuple[Base, dict[int, int]]:
    """The base with the adapter folded into it, and pseudo-label -> row of the class table.

    Args:
        vae: VAE to use in place of the base's own.
    """
    from ddsr_core.diffusion.base import load_base
    from ddsr_core.diffusion.difffit import fold, load_adapter

    model = load_base(str(base), device, vae)
    tuned = load_adapter(adapter, weights)
    tuned.apply(model.dit, model.digest)
    fold(model.dit)
    model.dit.requires_grad_(False)
    return model, tuned.label_map


def _draw(config: SampleConfig, model: Base, rows: list[int], indices: list[int], start: Tensor | None) -> np.ndarray:
    import torch

    from ddsr_core.diffusion.decoding import decode_pixels
    from ddsr_core.diffusion.samplers import sample_latents

    device = next(model.dit.parameters()).device
    half = config.precision == "bf16"
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        latents = sample_latents(
            model.dit, torch.tensor(rows, device=device), indices, seed=config.seed, sampler=config.sampler,
            steps=config.steps, guidance_scale=config.guidance_scale, guided_channels=config.guided_channels,
            guidance_interval=config.guidance_interval, start=start, strength=config.strength,
        )  # fmt: skip
        return decode_pixels(model, latents, config.decode_tile_px)


def write_chosen(config: SampleConfig, chosen: list[Path], teacher: Path | None, out: Path, runtime: Runtime) -> list[Path]:
    """Write the images of the set, in order, as they were drawn or with restored detail; returns their files."""
    files = [out / image_set_name(position) for position in range(len(chosen))]
    images: Iterator[bytes]
    if teacher and config.detail_restoration > 0:
        images = map(encode_png, restored_files(teacher, chosen, config.detail_restoration, runtime))
    else:
        images = (path.read_bytes() for path in chosen)
    for path, data in zip(files, images, strict=True):
        write_atomically(path, data)
    return files


def check_teacher(config: SampleConfig, teacher: Path | None) -> None:
    """A choice by SR gain and restored detail need the network, before anything is drawn."""
    if config.needs_teacher and teacher is None:
        raise ConfigError(
            "a choice by SR gain and restored detail need an SR network",
            where="sample.sr_gain_share, sample.detail_restoration",
            fix="give an artifact of the train_sr stage as input `teacher`, or set sr_gain_share=1 and detail_restoration=0",
        )


def _candidate(out: Path, index: int) -> Path:
    return out / RESUME / "candidates" / f"{index:08d}.png"


def _choose_of_label(
    config: SampleConfig, label: int, candidates: np.ndarray, share: int, compared: Comparison, gains: np.ndarray | None
) -> tuple[list[int], Scores, Scores]:
    """The candidates to keep, their scores, and those of a random choice among the same."""
    allowed = candidates[~refused(config, compared)[candidates]]
    if len(allowed) < share:
        raise InputError(
            f"{len(candidates) - len(allowed)} of {len(candidates)} samples of pseudo-label {label} copy training patches "
            f"(cosine above {config.max_cosine} by pixels or {config.max_embedding_cosine} by embedding)",
            where="sample.max_cosine, sample.max_embedding_cosine",
            fix="raise sample.oversample or sample.strength, fine-tune for fewer steps, or raise the limit",
        )
    if gains is not None:
        allowed = allowed[most_learnable(gains[allowed], config.sr_gain_share, share)]
    psnr = compared.psnr_bic[allowed]
    target = compared.real_psnr_bic[compared.real_labels == label]
    similarity = compared.real_vectors[label] @ compared.vectors[allowed].T
    kept = choose(config.select, psnr, target, similarity, share)
    by_chance = random_score(share, psnr, target, similarity, config.seed)
    return [int(index) for index in allowed[kept]], score(kept, psnr, target, similarity), by_chance


def refused(config: SampleConfig, compared: Comparison) -> np.ndarray:
    """Candidates too similar to a training patch, ``bool (n,)``; a limit of 1 refuses not even copies."""
    by_pixels = (compared.by_pixels.cosine > config.max_cosine) & (config.max_cosine < 1)
    return by_pixels | ((compared.by_embedding.cosine > config.max_embedding_cosine) & (config.max_embedding_cosine < 1))


def _row(
    config: SampleConfig, index: int, label: int, starts: list[str] | None, final: Comparison, place: int,
    gains: np.ndarray | None,
) -> dict[str, Any]:  # fmt: skip
    """Of the candidate ``index``; ``final`` describes the images as they are written, this one at ``place``."""
    return {
        "pseudo_label": label, "seed": config.seed, "index": index, "start_patch_id": starts[index] if starts else None,
        "psnr_bic": round(float(final.psnr_bic[place]), 4),
        "nearest_patch_id": final.by_pixels.patch_id[place],
        "max_cosine_to_train": round(float(final.by_pixels.cosine[place]), 5),
        "nearest_patch_id_by_embedding": final.by_embedding.patch_id[place],
        "max_embedding_cosine_to_train": round(float(final.by_embedding.cosine[place]), 5),
        "sr_gain_db": None if gains is None else round(float(gains[index]), 4),
    }  # fmt: skip


def _write_set(out: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa

    fields = {
        "pseudo_label": pa.int32(), "seed": pa.int64(), "index": pa.int64(), "start_patch_id": pa.string(),
        "psnr_bic": pa.float64(), "nearest_patch_id": pa.string(), "max_cosine_to_train": pa.float64(),
        "nearest_patch_id_by_embedding": pa.string(), "max_embedding_cosine_to_train": pa.float64(),
        "sr_gain_db": pa.float64(),
    }  # fmt: skip
    finish_image_set(out, rows, fields)


def _summary(
    config: SampleConfig,
    rows: list[dict[str, Any]],
    compared: Comparison,
    scores: list[tuple[int, Scores, Scores]],
    out: Path,
) -> dict[str, Any]:
    from PIL import Image

    psnr = np.array([row["psnr_bic"] for row in rows])
    labels = np.array([row["pseudo_label"] for row in rows])
    with Image.open(io.BytesIO((out / image_set_name(0)).read_bytes())) as first:
        width, height = first.size
    return {
        "count": len(rows),
        "height": height,
        "width": width,
        "candidates": len(compared.psnr_bic),
        "refused": int(refused(config, compared).sum()),
        "psnr_bic_mean": round(float(psnr.mean()), 4),
        "psnr_bic_real_mean": round(float(compared.real_psnr_bic.mean()), 4),
        "psnr_bic_by_label": {str(label): round(float(psnr[labels == label].mean()), 4) for label in np.unique(labels)},
        "max_cosine_to_train": max(row["max_cosine_to_train"] for row in rows),
        "max_embedding_cosine_to_train": max(row["max_embedding_cosine_to_train"] for row in rows),
        **_mean_scores([(share, reached) for share, reached, _ in scores], ""),
        **_mean_scores([(share, by_chance) for share, _, by_chance in scores], "_random"),
    }


def _mean_scores(scores: list[tuple[int, Scores]], suffix: str) -> dict[str, float]:
    """Means over the pseudo-labels, weighted by their shares."""
    total = sum(share for share, _ in scores)
    distance = sum(share * item.psnr_bic_wasserstein_db for share, item in scores) / total
    coverage = sum(share * item.coverage for share, item in scores) / total
    return {f"psnr_bic_wasserstein_db{suffix}": round(distance, 4), f"coverage{suffix}": round(coverage, 5)}


STAGE = Stage("sample", version=3, run=run, config=SampleConfig, section="II-C", on_gpu=True)
