"""Figures of a base model's card: PSNR_bic of real patches, of their reconstructions, and of samples; a sheet of samples.

    python -m benchmarks.base_model [--base ddsr-tiny] [--sheet samples.png]

The patches are windows of the demo photos whose PSNR_bic is below 26 dB. The base model was not trained on these photos.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from ddsr_core.diffusion.base import Base, load_base
from ddsr_core.diffusion.samplers import sample_latents
from ddsr_core.imaging.bicubic import psnr_bic
from ddsr_core.imaging.contact_sheet import contact_sheet
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.demo_photos import write_demo_photos
from ddsr_core.imaging.images import from_signed, save_png, to_float, to_signed, to_uint8
from ddsr_core.imaging.photos import find_images
from ddsr_core.pseudo_labels.config import PatchesConfig
from ddsr_core.pseudo_labels.windows import score_windows

BELOW_DB = 26.0
SAMPLING_BATCH = 35


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
def sample(base: Base, guidance: float, count: int) -> torch.Tensor:
    """``count`` images: every eighth of the null label, the others of the classes in turn."""
    rows = torch.tensor([base.null_row if i % 8 == 0 else i % base.dit.config.classes for i in range(count)])
    parts = []
    for start in range(0, count, SAMPLING_BATCH):
        chunk = slice(start, start + SAMPLING_BATCH)
        indices = list(range(count))[chunk]
        latents = sample_latents(base.dit, rows[chunk], indices, seed=0, sampler="dpmpp", steps=25, guidance_scale=guidance)
        parts.append(from_signed(base.decode(latents)).clamp(0, 1))
    return torch.cat(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="ddsr-tiny")
    parser.add_argument("--sheet", type=Path, default=None, help="write the samples without guidance to this PNG file")
    parser.add_argument("--samples", type=int, default=70, help="images sampled per guidance scale")
    parser.add_argument("--windows", type=int, default=None, help="use only this many patches")
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
        samples = sample(base, guidance, options.samples)
        figures[f"psnr_bic_samples_guidance_{guidance}_db"] = float(psnr_bic(samples).mean())
        if guidance == 1.0 and options.sheet:
            save_png(options.sheet, contact_sheet(list(to_uint8(samples)), columns=14, px=base.image_px))
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}, indent=2))


if __name__ == "__main__":
    main()
