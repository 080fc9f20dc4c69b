"""Stage 6, sampling: the distilled data set from the fine-tuned model (paper, II-C).

Over-sample and select: `sample_candidates` makes ``oversample`` candidates per image, `ddsr_core.sampling.selection`
compares them with the real patches, and for each pseudo-label those are selected that represent its patches and copy none
of them.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ddsr_core.config import Runtime
from ddsr_core.diffusion.base import Base, load_base
from ddsr_core.diffusion.decoding import decode_pixels
from ddsr_core.diffusion.difffit import fold, load_adapter
from ddsr_core.diffusion.samplers import sample_latents
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.image_sets import finish_image_set, image_set_name
from ddsr_core.imaging.images import encode_png
from ddsr_core.sampling.allocation import images_per_label
from ddsr_core.sampling.config import SAMPLED, SampleConfig
from ddsr_core.sampling.init_patches import InitLatents, init_patches
from ddsr_core.sampling.quality import set_quality
from ddsr_core.sampling.restoration import restored_files
from ddsr_core.sampling.selection import (
    Comparison,
    References,
    Scores,
    choose,
    compare,
    own_cluster_first,
    random_score,
    score,
)
from ddsr_core.sampling.sr_gain import gains_of_files, highest_gain
from ddsr_core.storage.files import write_atomically, write_json
from ddsr_core.storage.stage import RESUME, Stage, StageResult

#: Numbers of the summary that go into the artifact's manifest.
COUNTED = (
    "count", "height", "width", "psnr_bic_mean", "psnr_bic_real_mean", "max_cosine_to_train", "coverage",
    "own_cluster_share", "precision", "recall", "psnr_bic_distance_db",
)  # fmt: skip
#: Columns that a distilled set has beside its images.
FIELDS = {
    "pseudo_label": pa.int32(), "seed": pa.int64(), "index": pa.int64(), "init_patch_id": pa.string(),
    "psnr_bic": pa.float64(), "nearest_patch_id": pa.string(), "max_cosine_to_train": pa.float64(),
    "nearest_patch_id_by_embedding": pa.string(), "max_embedding_cosine_to_train": pa.float64(),
    "sr_gain_db": pa.float64(),
}  # fmt: skip


@dataclass(frozen=True)
class ModelFiles:
    """What the tuned model is loaded from: adapter, base model, and a VAE that replaces the base model's own."""

    adapter: Path
    base: Path
    vae: Path | None = None


@dataclass(frozen=True)
class Candidates:
    """The images to sample.

    Attributes:
        folder: where they are written as PNG files.
        labels: pseudo-labels ``(n,)``.
        init_ids: patch that each starts from; None for pure noise.
    """

    folder: Path
    labels: np.ndarray
    init_ids: list[str] | None

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        return self.folder / f"{index:08d}.png"

    @property
    def paths(self) -> list[Path]:
        return [self.path(index) for index in range(len(self))]


@dataclass(frozen=True)
class Selected:
    """The selection for one pseudo-label: indices of candidates, their scores, and those of random selections."""

    indices: list[int]
    scores: Scores
    random: Scores


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
    """Sample the candidates, select from them, and write the distilled set.

    Args:
        weights: open_clip weights file, if the embeddings were made with one.
        vae: VAE that replaces the base model's own.
        latents: artifact of the latents stage, required if ``strength`` is below 1.
        teacher: artifact of the train_sr stage, required if ``sr_gain_share`` is below 1 or ``detail_restoration`` above 0.

    Raises:
        ConfigError: ``teacher`` is required and missing.
        InputError: the artifacts do not belong together, or too many candidates copy training patches.
    """
    require_teacher(config, teacher)
    references = References(patches, clusters, embeddings, weights)
    shares = images_per_label(config.count, _cluster_sizes(clusters), config.allocation)
    candidates = plan_candidates(config, shares, clusters, out)
    sample_candidates(config, candidates, ModelFiles(adapter, base, vae), latents, runtime)
    compared = compare(candidates.paths, references, runtime, config.scale)
    gains = gains_of_files(teacher, candidates.paths, runtime) if teacher and config.sr_gain_share < 1 else None
    selected = [
        select_for_label(config, label, np.flatnonzero(candidates.labels == label), share, compared, gains)
        for label, share in enumerate(shares)
        if share
    ]
    chosen = [index for part in selected for index in part.indices]
    written = write_images(config, [candidates.path(index) for index in chosen], teacher, out, runtime)
    described, places = compared, chosen
    if config.detail_restoration > 0:  # the images are no longer those that were compared
        write_sampled(out, [candidates.path(index) for index in chosen])
        described, places = compare(written, references, runtime, config.scale), list(range(len(written)))
    rows = [_row(config, candidates, index, gains) | _facts(described, place)
            for index, place in zip(chosen, places, strict=True)]  # fmt: skip
    finish_image_set(out, rows, FIELDS)
    summary = {
        **_summary(config, rows, compared, selected, out),
        **_quality(config, (compared, chosen), (described, places), candidates.labels[chosen]),
    }
    write_json(out / "summary.json", summary)
    return StageResult({name: summary[name] for name in COUNTED})


def require_teacher(config: SampleConfig, teacher: Path | None) -> None:
    """Check, before anything is sampled, that the SR network is given if selection or restoration needs it.

    Raises:
        ConfigError: it is missing.
    """
    if config.needs_teacher and teacher is None:
        raise ConfigError(
            "selection by SR gain and detail restoration need an SR network",
            where="sample.sr_gain_share, sample.detail_restoration",
            fix="give an artifact of the train_sr stage as input `teacher`, or set sr_gain_share=1 and detail_restoration=0",
        )


def _cluster_sizes(clusters: Path) -> list[int]:
    sizes: list[int] = json.loads((clusters / "summary.json").read_text())["sizes"]
    return sizes


def plan_candidates(config: SampleConfig, shares: Sequence[int], clusters: Path, out: Path) -> Candidates:
    """``oversample`` candidates for each of the ``shares[label]`` images of every pseudo-label."""
    labels = np.repeat(np.arange(len(shares)), [share * config.oversample for share in shares])
    init_ids = init_patches(labels, clusters, config.init) if config.strength < 1 else None
    return Candidates(out / RESUME / "candidates", labels, init_ids)


def sample_candidates(
    config: SampleConfig, candidates: Candidates, files: ModelFiles, latents: Path | None, runtime: Runtime
) -> None:
    """Sample the candidates and write them to their folder; those that exist are kept.

    Raises:
        InputError: adapter, base, clusters and latents do not belong together.
    """
    candidates.folder.mkdir(parents=True, exist_ok=True)
    # Always the same batches: a batch of another size rounds differently in the last bit. An interrupted run samples its
    # last batch again and writes only the images that are missing.
    starts = range(0, len(candidates), config.batch_size)
    batches = [list(range(start, min(start + config.batch_size, len(candidates)))) for start in starts]
    todo = [batch for batch in batches if not all(candidates.path(index).exists() for index in batch)]
    if not todo:
        return
    model, label_map = load_tuned(files.adapter, files.base, config.weights, runtime.device, files.vae)
    if unknown := sorted(set(candidates.labels.tolist()) - set(label_map)):
        raise InputError(
            f"the adapter does not know the pseudo-labels {unknown}",
            where=files.adapter,
            fix="give the clusters that it was fine-tuned on",
        )
    init_latents = InitLatents(model, latents) if candidates.init_ids else None
    done = len(candidates) - sum(map(len, todo))
    with runtime.progress("Sampling", total=len(candidates), unit="images", done=done) as bar:
        for batch in todo:
            init = None
            if init_latents and candidates.init_ids:
                init = init_latents.of([candidates.init_ids[index] for index in batch])
            rows = [label_map[int(candidates.labels[index])] for index in batch]
            images = _sample_batch(config, model, rows, batch, init)
            for index, image in zip(batch, images, strict=True):
                if not candidates.path(index).exists():
                    write_atomically(candidates.path(index), encode_png(image))
            bar.advance(len(batch))


def load_tuned(
    adapter: Path, base: Path, weights: Literal["ema", "raw"], device: str, vae: Path | None = None
) -> tuple[Base, dict[int, int]]:
    """The base model with the adapter folded into it, and pseudo-label -> row of the class table.

    Args:
        vae: VAE that replaces the base model's own.

    Raises:
        InputError: the adapter belongs to another base model, or is damaged.
    """
    model = load_base(str(base), device, vae)
    tuned = load_adapter(adapter, weights)
    tuned.apply(model.dit, model.digest)
    fold(model.dit)
    model.dit.requires_grad_(False)
    return model, tuned.label_map


def _sample_batch(config: SampleConfig, model: Base, rows: list[int], indices: list[int], init: Tensor | None) -> np.ndarray:
    """Pixels ``uint8 (B, H, W, 3)``."""
    device = next(model.dit.parameters()).device
    half = config.precision == "bf16"
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        latents = sample_latents(
            model.dit, torch.tensor(rows, device=device), indices, seed=config.seed, sampler=config.sampler,
            steps=config.steps, guidance_scale=config.guidance_scale, guided_channels=config.guided_channels,
            guidance_interval=config.guidance_interval, init=init, strength=config.strength,
        )  # fmt: skip
        return decode_pixels(model, latents, config.decode_tile_px)


def select_for_label(
    config: SampleConfig, label: int, members: np.ndarray, share: int, compared: Comparison, gains: np.ndarray | None
) -> Selected:
    """Select ``share`` of the candidates ``members`` of a pseudo-label.

    Raises:
        InputError: too many candidates copy training patches.
    """
    allowed = members[~rejected(config, compared)[members]]
    if len(allowed) < share:
        raise InputError(
            f"{len(members) - len(allowed)} of {len(members)} samples of pseudo-label {label} copy training patches "
            f"(cosine above {config.max_cosine} by pixels or {config.max_embedding_cosine} by embedding)",
            where="sample.max_cosine, sample.max_embedding_cosine",
            fix="raise sample.oversample or sample.strength, fine-tune for fewer steps, or raise the limit",
        )
    if gains is not None:
        allowed = allowed[highest_gain(gains[allowed], config.sr_gain_share, share)]
    psnr = compared.psnr_bic[allowed]
    target = compared.real_psnr_bic[compared.real_labels == label]
    similarity = compared.real_vectors[label] @ compared.vectors[allowed].T
    if config.own_cluster:
        kept = own_cluster_first(compared.nearest_label[allowed] == label, similarity.max(0), share)
        allowed, psnr, similarity = allowed[kept], psnr[kept], similarity[:, kept]
    chosen = choose(config.select, psnr, target, similarity, share)
    random = random_score(share, psnr, target, similarity, config.seed)
    return Selected([int(index) for index in allowed[chosen]], score(chosen, psnr, target, similarity), random)


def rejected(config: SampleConfig, compared: Comparison) -> np.ndarray:
    """Candidates that are too similar to a training patch, ``bool (n,)``; a limit of 1 rejects nothing."""
    by_pixels = (compared.by_pixels.cosine > config.max_cosine) & (config.max_cosine < 1)
    return by_pixels | ((compared.by_embedding.cosine > config.max_embedding_cosine) & (config.max_embedding_cosine < 1))


def write_images(config: SampleConfig, chosen: list[Path], teacher: Path | None, out: Path, runtime: Runtime) -> list[Path]:
    """Write the images of the set, in order, as sampled or with restored detail; returns their files."""
    files = [out / image_set_name(position) for position in range(len(chosen))]
    images: Iterator[bytes]
    if teacher and config.detail_restoration > 0:
        images = map(encode_png, restored_files(teacher, chosen, config.detail_restoration, runtime))
    else:
        images = (path.read_bytes() for path in chosen)
    for path, data in zip(files, images, strict=True):
        write_atomically(path, data)
    return files


def write_sampled(out: Path, chosen: list[Path]) -> None:
    """Keep the selected images as they were sampled, under the names of the restored ones."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # stored, with a fixed date: the same bytes every time
        for position, path in enumerate(chosen):
            archive.writestr(zipfile.ZipInfo(Path(image_set_name(position)).name), path.read_bytes())
    write_atomically(out / SAMPLED, buffer.getvalue())


def _row(config: SampleConfig, candidates: Candidates, index: int, gains: np.ndarray | None) -> dict[str, Any]:
    """The origin of an image."""
    return {
        "pseudo_label": int(candidates.labels[index]),
        "seed": config.seed,
        "index": index,
        "init_patch_id": candidates.init_ids[index] if candidates.init_ids else None,
        "sr_gain_db": None if gains is None else round(float(gains[index]), 4),
    }


def _facts(described: Comparison, place: int) -> dict[str, Any]:
    """Measurements of an image in its final form."""
    return {
        "psnr_bic": round(float(described.psnr_bic[place]), 4),
        "nearest_patch_id": described.by_pixels.patch_id[place],
        "max_cosine_to_train": round(float(described.by_pixels.cosine[place]), 5),
        "nearest_patch_id_by_embedding": described.by_embedding.patch_id[place],
        "max_embedding_cosine_to_train": round(float(described.by_embedding.cosine[place]), 5),
    }


def _summary(
    config: SampleConfig, rows: list[dict[str, Any]], compared: Comparison, selected: list[Selected], out: Path
) -> dict[str, Any]:
    psnr = np.array([row["psnr_bic"] for row in rows])
    labels = np.array([row["pseudo_label"] for row in rows])
    height, width, _ = read_rgb(out / image_set_name(0)).shape
    return {
        "count": len(rows),
        "height": height,
        "width": width,
        "candidates": len(compared.psnr_bic),
        "refused": int(rejected(config, compared).sum()),
        "psnr_bic_mean": round(float(psnr.mean()), 4),
        "psnr_bic_real_mean": round(float(compared.real_psnr_bic.mean()), 4),
        "psnr_bic_by_label": {str(label): round(float(psnr[labels == label].mean()), 4) for label in np.unique(labels)},
        "max_cosine_to_train": max(row["max_cosine_to_train"] for row in rows),
        "max_embedding_cosine_to_train": max(row["max_embedding_cosine_to_train"] for row in rows),
        **_mean_scores([(len(part.indices), part.scores) for part in selected], ""),
        **_mean_scores([(len(part.indices), part.random) for part in selected], "_random"),
    }


def _quality(
    config: SampleConfig,
    sampled: tuple[Comparison, list[int]],
    final: tuple[Comparison, list[int]],
    labels: np.ndarray,
) -> dict[str, Any]:
    """Quality of the set as it was sampled and selected; below ``restored`` that of the restored images, if it has any."""
    compared, places = sampled
    summary: dict[str, Any] = dict(set_quality(compared, places, labels).rounded())
    summary["psnr_bic_sampled_mean"] = round(float(compared.psnr_bic[places].mean()), 4)
    if config.detail_restoration > 0:
        summary["restored"] = set_quality(*final, labels).rounded()
    return summary


def _mean_scores(scores: list[tuple[int, Scores]], suffix: str) -> dict[str, float]:
    """Means over the pseudo-labels, weighted by their images."""
    total = sum(share for share, _ in scores)
    distance = sum(share * item.psnr_bic_wasserstein_db for share, item in scores) / total
    coverage = sum(share * item.coverage for share, item in scores) / total
    return {f"psnr_bic_wasserstein_db{suffix}": round(distance, 4), f"coverage{suffix}": round(coverage, 5)}


STAGE = Stage(
    "sample",
    version=4,
    run=run,
    config=SampleConfig,
    section="II-C",
    on_gpu=True,
    words="{count:,} distilled images of {height} px",
)
