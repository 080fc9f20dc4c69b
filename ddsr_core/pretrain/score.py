"""Quality of a base model, measured on patches of held-out photos in VGG16 features and PSNR_bic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor, nn

from ddsr_core.diffusion.dit import DiT
from ddsr_core.diffusion.gaussian import Schedule, q_sample
from ddsr_core.diffusion.samplers import sample_latents
from ddsr_core.imaging.bicubic import psnr_bic
from ddsr_core.imaging.images import from_signed
from ddsr_core.metrics.clouds import frechet_distance, precision_recall
from ddsr_core.pseudo_labels.patch_features import PatchFeatures

#: Timesteps that the eps error is measured at.
ERROR_STEPS = (50, 200, 400, 600, 800)
DRAW_BATCH = 64


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
        held_out: features ``(H, 512)`` of held-out patches, of length 1.
        classes: the class of each, ``int64 (H,)``.
        psnr: PSNR_bic of each in dB, ``(H,)``.
        train: features ``(N, 512)`` of the training patches; ``train_classes``: the class of each.
        latents: normalized latents ``(H, C, h, w)`` of the held-out patches.
    """

    held_out: Tensor
    classes: Tensor
    psnr: Tensor
    train: Tensor
    train_classes: Tensor
    latents: Tensor


def cloud_scores(vectors: Tensor, psnr: Tensor, classes: Tensor, reference: Reference) -> dict[str, float]:
    """Scores of a set of images: features ``(n, 512)``, PSNR_bic ``(n,)``, the requested classes ``(n,)``."""
    count = len(vectors)
    real, real_psnr = reference.held_out[:count], reference.psnr[:count]
    precision, recall = precision_recall(real, vectors)
    nearest = torch.cat([(part @ reference.train.T).max(1).indices for part in vectors.split(256)])
    cosine = torch.cat([(part @ real.T).max(1).values for part in vectors.split(256)])
    return {
        "frechet": frechet_distance(real, vectors),
        "precision": precision,
        "recall": recall,
        "psnr_bic_db": float(psnr.mean()),
        "psnr_bic_distance_db": float(wasserstein_distance(psnr.numpy(), real_psnr.numpy())),
        "nearest_cosine": float(cosine.mean()),
        "own_class_share": float((reference.train_classes[nearest] == classes).float().mean()),
    }


@torch.inference_mode()
def eps_errors(model: DiT, latents: Tensor, classes: Tensor, seed: int) -> dict[str, float]:
    """Mean squared eps error on real latents with the own class row, another class's row and the null row, by timestep.

    Another class: that of the next patch with a different one.
    """
    schedule = Schedule()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    labels = {"own": classes, "other": other_classes(classes), "null": torch.full_like(classes, model.config.null_row)}
    errors: dict[str, float] = {}
    for step in ERROR_STEPS:
        t = torch.full((len(latents),), step)
        x_t = q_sample(schedule, latents, t, noise)
        for name, rows in labels.items():
            parts = zip(x_t.split(256), t.split(256), rows.split(256), strict=True)
            eps = torch.cat([model(x, s, y)[:, : latents.shape[1]] for x, s, y in parts])
            errors[f"eps_{name}_{step}"] = float((eps.float() - noise).square().mean())
    return errors


def other_classes(classes: Tensor) -> Tensor:
    """For each patch the class of the first of the patches after it that has a different one."""
    result = classes.clone()
    for shift in range(1, len(classes)):
        same = result == classes
        if not same.any():
            break
        result = torch.where(same, classes.roll(-shift), result)
    return result


def row_effect(errors: dict[str, float], name: str) -> float:
    """Mean relative increase of the error with the rows ``name`` over that with the own rows, in percent."""
    ratios = [errors[f"eps_{name}_{step}"] / errors[f"eps_own_{step}"] for step in ERROR_STEPS]
    return 100 * (float(np.mean(ratios)) - 1)


@torch.inference_mode()
def draw(model: DiT, decoder: nn.Module, rows: Tensor, unit: tuple[Tensor, Tensor], *, seed: int, steps: int) -> Tensor:
    """Images ``float (n, 3, px, px)`` in [0, 1], one per class row, without guidance.

    Args:
        unit: shift and scale that made the latents normal, each ``(C,)``.
    """
    shift, scale = (value[:, None, None] for value in unit)
    parts = []
    for start in range(0, len(rows), DRAW_BATCH):
        some = rows[start : start + DRAW_BATCH]
        indices = list(range(start, start + len(some)))
        latents = sample_latents(model, some, indices, seed=seed, sampler="dpmpp", steps=steps, guidance_scale=1.0)
        parts.append(from_signed(decoder(latents / scale + shift)).clamp(0, 1))
    return torch.cat(parts)


def score(
    model: DiT,
    decoder: nn.Module,
    unit: tuple[Tensor, Tensor],
    features: PatchFeatures,
    reference: Reference,
    *,
    samples: int,
    steps: int,
    seed: int,
) -> tuple[dict[str, float], Tensor]:
    """All scores of a model, and the images they were measured on: one for each of the first held-out patches' classes."""
    classes = reference.classes[:samples]
    images = draw(model, decoder, classes, unit, seed=seed, steps=steps)
    result = cloud_scores(features.vectors(images), psnr_bic(images), classes, reference)
    errors = eps_errors(model, reference.latents[:samples], classes, seed)
    effects = {f"{name}_row_percent": row_effect(errors, name) for name in ("other", "null")}
    return {**result, **effects, **errors}, images
