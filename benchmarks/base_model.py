"""Figures of a base model's card: PSNR_bic of real patches, of their reconstructions, and of samples; a sheet of samples.

    python -m benchmarks.base_model [--base ddsr-tiny] [--sheet samples.png]

The patches are windows of the demo photos whose PSNR_bic is below 26 dB. The base model was not trained on these photos.
With ``--patches FOLDER`` (``resume/patches`` of a `ddsr pretrain`), also the scores of `ddsr_core.pretrain.score` on the
held-out patches in it. Scores that need to know which patches a class stands for are left out for a base without its
class centers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ddsr_core.diffusion.base import CLASSES, Base, load_base, locate_base
from ddsr_core.diffusion.samplers import sample_latents
from ddsr_core.imaging.bicubic import psnr_bic
from ddsr_core.imaging.contact_sheet import contact_sheet
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.demo_photos import write_demo_photos
from ddsr_core.imaging.images import from_signed, save_png, to_float, to_signed, to_uint8
from ddsr_core.imaging.photos import find_images
from ddsr_core.pretrain.features import batches, describe
from ddsr_core.pretrain.score import Reference, cloud_scores, eps_errors, row_effect
from ddsr_core.pseudo_labels.config import PatchesConfig
from ddsr_core.pseudo_labels.patch_features import PatchFeatures, nearest_class
from ddsr_core.pseudo_labels.windows import score_windows

BELOW_DB = 26.0
SAMPLING_BATCH = 35
#: Training patches that nearest neighbors are looked for among.
MOST_TRAIN = 8_000


def textured_windows(side: int) -> torch.Tensor:
    """Windows of all demo photographs, ``float (N, 3, side, side)`` in [0, 1]."""
    config = PatchesConfig(patch_px=side, stride_px=side // 2)
    textured = []
    with tempfile.TemporaryDirectory() as folder:
        for part in write_demo_photos(Path(folder)):
            for path in find_images(part):
                image = read_rgb(path)
                windows = score_windows(image, config)
                for psnr, y, x in zip(windows.psnr_bic, windows.y, windows.x, strict=True):
                    if psnr < BELOW_DB:
                        textured.append(image[y : y + side, x : x + side])
    return to_float(np.stack(textured))


@torch.inference_mode()
def reconstruct(base: Base, images: torch.Tensor) -> torch.Tensor:
    parts = [from_signed(base.decode(base.encode(to_signed(chunk)))) for chunk in images.split(32)]
    return torch.cat(parts).clamp(0, 1)


@torch.inference_mode()
def sample(base: Base, rows: torch.Tensor, guidance: float) -> torch.Tensor:
    """One image per row of the class table."""
    parts = []
    for indices in torch.arange(len(rows)).split(SAMPLING_BATCH):
        latents = sample_latents(
            base.dit, rows[indices], indices.tolist(), seed=0, sampler="dpmpp", steps=25, guidance_scale=guidance
        )
        parts.append(from_signed(base.decode(latents)).clamp(0, 1))
    return torch.cat(parts)


def mixed_rows(base: Base, count: int) -> torch.Tensor:
    """Every eighth the null label, the others the classes in turn."""
    return torch.tensor([base.null_row if i % 8 == 0 else i % base.dit.config.classes for i in range(count)])


def held_out_scores(base: Base, centers: torch.Tensor | None, folder: Path, count: int) -> dict[str, float]:
    """Scores of ``count`` samples without guidance against held-out patches, given the centers of the classes if known."""
    train, held_out = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "held_out"))
    network = PatchFeatures(base.image_px, base.image_px // 8)
    real, _ = describe(held_out[:count], network, 0)
    known, _ = describe(train[: MOST_TRAIN if centers is not None else count], network, 0)
    count = len(real)
    real_psnr = torch.cat([psnr_bic(images) for _, images in batches(held_out[:count])])
    if centers is None:
        classes, train_classes = torch.arange(count) % base.dit.config.classes, torch.full((len(known),), -1)
    else:
        classes, train_classes = nearest_class(real, centers), nearest_class(known, centers)
    latents = torch.cat([base.encode(to_signed(images)) for _, images in batches(held_out[:count])])
    reference = Reference(real, classes, real_psnr, known, train_classes, latents)
    samples = sample(base, classes, 1.0)
    scores = cloud_scores(network.vectors(samples), psnr_bic(samples), classes, reference)
    if centers is None:
        return {name: value for name, value in scores.items() if name != "own_class_share"}
    errors = eps_errors(base.dit, latents, classes, seed=0)
    return {**scores, **{f"{name}_row_percent": row_effect(errors, name) for name in ("other", "null")}, **errors}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="ddsr-tiny")
    parser.add_argument("--sheet", type=Path, default=None, help="write the samples without guidance to this PNG file")
    parser.add_argument("--samples", type=int, default=70, help="images sampled per guidance scale")
    parser.add_argument("--windows", type=int, default=None, help="use only this many patches")
    parser.add_argument("--patches", type=Path, default=None, help="folder of held-out patches to score with")
    parser.add_argument("--scored", type=int, default=512, help="images sampled for the scores on held-out patches")
    options = parser.parse_args(arguments)
    base = load_base(options.base)
    real = textured_windows(base.image_px)[: options.windows]
    again = reconstruct(base, real)
    error = (real - again).square().mean((1, 2, 3))
    figures = {
        "windows": len(real),
        "reconstruction_psnr_db": float((-10 * error.log10()).mean()),
        "psnr_bic_real_db": float(psnr_bic(real).mean()),
        "psnr_bic_reconstruction_db": float(psnr_bic(again).mean()),
    }
    for guidance in (1.0, 1.5, 2.5):
        samples = sample(base, mixed_rows(base, options.samples), guidance)
        figures[f"psnr_bic_samples_guidance_{guidance}_db"] = float(psnr_bic(samples).mean())
        if guidance == 1.0 and options.sheet:
            save_png(options.sheet, contact_sheet(list(to_uint8(samples)), columns=14, px=base.image_px))
    if options.patches:
        path = locate_base(options.base) / CLASSES
        centers = load_file(path)["centers"] if path.is_file() else None
        figures |= held_out_scores(base, centers, options.patches, options.scored)
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}, indent=2))


if __name__ == "__main__":
    main()
