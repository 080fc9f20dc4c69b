"""Where distilled images fall short of real patches: SR gain and PSNR_bic of patches, reconstructions and samples.

    python -m benchmarks.structure PHOTOS --home HOME [--set sample.count=70] [--only "samples of the base"]

SR gain (`ddsr_core.sampling.sr_gain`) is the PSNR by which a small SR network, trained on the accepted patches, beats
bicubic on an image: it measures detail that can be inferred from the surroundings. The protocol is `mini` of
`ddsr reproduce`, one seed, without selection and without detail restoration. Stages are cached in HOME.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ddsr_core.diffusion.base import base_source, load_base
from ddsr_core.diffusion.decoding import decode_pixels
from ddsr_core.imaging.bicubic import psnr_bic
from ddsr_core.imaging.decode import decode_rgb, read_rgb
from ddsr_core.imaging.image_sets import read_image_parquet, read_image_set
from ddsr_core.imaging.images import to_float
from ddsr_core.imaging.photos import photo_source
from ddsr_core.pipeline.config import PipelineConfig, load_config
from ddsr_core.pipeline.distill import distill
from ddsr_core.pipeline.plain import plain_backend
from ddsr_core.pipeline.request import Execution
from ddsr_core.pipeline.stages import Stages
from ddsr_core.sampling.sr_gain import BATCH, sr_gains
from ddsr_core.sr.weights import load_network
from ddsr_core.storage.store import Store
from flows.cli.console import progress_for

PATCHES = 600
AS_SAMPLED = ("sample.oversample=1", "sample.select=none", "sample.max_cosine=1.0", "sample.sr_gain_share=1.0",
            "sample.allocation=proportional", "sample.detail_restoration=0")  # fmt: skip
SPREAD = ("finetune.lsr_mode=off", "sample.init=k-center")
SETTINGS: dict[str, tuple[str, ...]] = {
    "samples of the base": ("finetune.steps=0",),
    "fine-tuned, L_SR off": ("finetune.lsr_mode=off",),
    "fine-tuned, L_SR target": ("finetune.lsr_mode=target",),
    "L_SR off, started from patches noised to t = 700": (*SPREAD, "sample.strength=0.7"),
    "L_SR off, started from patches noised to t = 500": (*SPREAD, "sample.strength=0.5"),
    "L_SR off, started from patches noised to t = 300": (*SPREAD, "sample.strength=0.3"),
    "L_SR off, started from patches noised to t = 100": (*SPREAD, "sample.strength=0.1"),
    "L_SR off, the fifth with the highest SR gain of 10 candidates per image": (
        "finetune.lsr_mode=off", "sample.oversample=10", "sample.select=psnr_bic_and_coverage", "sample.sr_gain_share=0.2",
    ),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="settings to measure")
    options = parser.parse_args(arguments)
    store = Store(options.home)
    config = load_config("demo", None, [*AS_SAMPLED, *options.set], protocol="mini")
    stages = Stages(config, plain_backend(Execution(device="cpu"), store, progress_for()))
    accepted = stages.patches(photo_source(options.photos))
    network = load_network(stages.train_sr(config.teacher, accepted, "teacher").path, trust=True).module
    print("| images | SR gain, dB: mean | 10 % | median | 90 % | PSNR_bic, dB |\n|---|---|---|---|---|---|")
    for name, images in rows(stages, accepted.path, options):
        gains = np.concatenate([sr_gains(network, images[at : at + BATCH]) for at in range(0, len(images), BATCH)])
        low, middle, high = np.percentile(gains, [10, 50, 90])
        print(f"| {name} | {gains.mean():.2f} | {low:.2f} | {middle:.2f} | {high:.2f} | {psnr_bic(images).mean():.2f} |",
              flush=True)  # fmt: skip


def rows(stages: Stages, accepted: Path, options: argparse.Namespace) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and images, float32 ``(n, 3, H, W)`` in [0, 1]."""
    stored = list(read_image_parquet(accepted))
    chosen = [stored[index] for index in np.linspace(0, len(stored) - 1, min(PATCHES, len(stored))).round().astype(int)]
    real = to_float(np.stack([decode_rgb(row["image"]["bytes"], row["patch_id"]) for row in chosen]))
    yield f"{len(real)} accepted patches", real
    yield "the same, encoded and decoded", through_the_base(stages.config, real)
    photos = photo_source(options.photos)
    for name in options.only:
        changed = load_config("demo", None, [*AS_SAMPLED, *SETTINGS[name], *options.set], protocol="mini")
        distilled = distill(stages.with_config(changed), photos).images
        pictures = [read_rgb(distilled.path / row["file_name"]) for row in read_image_set(distilled.path)]
        yield name, to_float(np.stack(pictures))


def through_the_base(config: PipelineConfig, images: torch.Tensor) -> torch.Tensor:
    """Images after the base's VAE has encoded and decoded them."""
    base = load_base(base_source(config.base).path, "cpu")
    with torch.no_grad():
        parts = [decode_pixels(base, base.encode(images[at : at + BATCH] * 2 - 1)) for at in range(0, len(images), BATCH)]
    return to_float(np.concatenate(parts))


if __name__ == "__main__":
    main()
