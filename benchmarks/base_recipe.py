"""Compares recipes of the diffusion prior at equal CPU time, by their scores on held-out patches.

    python -m benchmarks.base_recipe PATCHES --work FOLDER [--cpu-minutes 3] [--only "batch 32"]

PATCHES: the folder ``resume/patches`` of a `ddsr pretrain`. Latents come from the autoencoder of ``--base``. Each result
is a line of ``FOLDER/results.jsonl``; recipes that have one are not trained again, and the table of all is printed.
The learning rate stays constant, and the averaged weights are measured, as in the middle of a long run.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddsr_core.config import Runtime
from ddsr_core.diffusion.base import load_base
from ddsr_core.imaging.bicubic import psnr_bic
from ddsr_core.imaging.contact_sheet import contact_sheet
from ddsr_core.imaging.images import save_png, to_uint8
from ddsr_core.pretrain.config import PretrainConfig
from ddsr_core.pretrain.features import batches, make_classes
from ddsr_core.pretrain.prior import PriorData, PriorTrainer, channel_statistics, encode_all
from ddsr_core.pretrain.run import Patches, features_of
from ddsr_core.pretrain.score import Reference, cloud_scores, score
from ddsr_core.pseudo_labels.patch_features import PatchFeatures, nearest_class
from flows.cli.console import progress_for

#: What all recipes share; a run at constant learning rate, so that none of them is favored by its end.
COMMON: dict[str, Any] = {
    "prior_steps": 1_000_000, "prior_batch": 32, "hidden": 192, "depth": 6, "heads": 6, "row_std": 0.02, "repa_weight": 0.5,
    "repa_block": 3, "ema_decay": 0.99,
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "reference: batch 32, 6 x 192, 64 classes, REPA": {},
    "batch 128": {"prior_batch": 128},
    "4 x 256": {"hidden": 256, "depth": 4, "heads": 4, "repa_block": 2},
    "no REPA": {"repa_weight": 0.0},
    "loss weights min(SNR, 5) / SNR": {"timestep_weighting": "min_snr"},
    "t logit-normal": {"timestep_weighting": "logit_normal"},
    "128 classes": {"classes": 128},
    "class rows apart (std 0.5)": {"row_std": 0.5},
    "EMA 0.999": {"ema_decay": 0.999},
}
COLUMNS = {
    "samples": "samples seen",
    "frechet": "Frechet",
    "precision": "precision",
    "recall": "recall",
    "psnr_bic_distance_db": "PSNR_bic distance, dB",
    "nearest_cosine": "nearest cosine",
    "own_class_share": "own class",
    "other_row_percent": "error, other row",
    "null_row_percent": "error, null row",
}


def prepare(patches: Patches, base_name: str, work: Path) -> dict[str, Tensor]:
    """Latents and VGG16 features of all patches, kept in ``work``."""
    path = work / "features.safetensors"
    if not path.exists():
        base = load_base(base_name)
        side = patches.train.shape[1]
        config = PretrainConfig(image_px=side, repa_weight=1.0, classes=min(64, len(patches.train) // 4))
        found = features_of(config, patches, Runtime(progress=progress_for()))
        latents = {
            "latents": encode_all(base.vae.encoder, patches.train),
            "held_out_latents": encode_all(base.vae.encoder, patches.held_out)[0].contiguous(),
        }
        save_file({**found, **latents}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    return load_file(path)


def data_of(
    stored: dict[str, Tensor], config: PretrainConfig, psnr: Tensor
) -> tuple[PriorData, Reference, tuple[Tensor, Tensor]]:
    """What a recipe is trained on and measured with."""
    shift, scale = (torch.tensor(values) for values in channel_statistics(stored["latents"]))
    shift_, scale_ = shift[:, None, None], scale[:, None, None]
    vectors = stored["vectors"].float()
    classes, centers = make_classes(vectors, config.classes, config.seed)
    data = PriorData(((stored["latents"] - shift_) * scale_).half(), classes, stored["tokens"])
    held_out = nearest_class(stored["held_out"], centers)
    latents = (stored["held_out_latents"].float() - shift_) * scale_
    return data, Reference(stored["held_out"], held_out, psnr, vectors, classes, latents), (shift, scale)


def config_of(name: str, stored: dict[str, Tensor], settings: dict[str, Any]) -> PretrainConfig:
    """The config of a recipe; never more classes than a quarter of the patches."""
    values = {"classes": 64, **COMMON, **settings, **RECIPES[name]}
    return PretrainConfig(**{**values, "classes": min(values["classes"], len(stored["vectors"]) // 4)})


def measure(
    name: str,
    stored: dict[str, Tensor],
    psnr: Tensor,
    decoder: nn.Module,
    options: argparse.Namespace,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Train one recipe for ``cpu_minutes`` (one step at least) and score it."""
    config = config_of(name, stored, settings)
    data, reference, unit = data_of(stored, config, psnr)
    network = PatchFeatures(config.image_px, config.image_px // 8)
    trainer = PriorTrainer(config, data)
    stop = time.process_time() + 60 * options.cpu_minutes
    while trainer.step == 0 or time.process_time() < stop:
        trainer.advance()
    values, images = score(
        trainer.ema, decoder, unit, network, reference,
        samples=config.score_samples, steps=config.score_sampler_steps, seed=config.seed,
    )  # fmt: skip
    sheet = contact_sheet(list(to_uint8(images[:48])), columns=16, px=config.image_px)
    save_png(options.work / f"{name.split(':')[0].replace('/', 'over').replace(' ', '-')}.png", sheet)
    return {"recipe": name, "cpu_minutes": options.cpu_minutes, "samples": trainer.step * config.prior_batch, **values}


def real_row(stored: dict[str, Tensor], psnr: Tensor, patches: Patches, count: int) -> dict[str, Any]:
    """Training patches in place of samples: what a perfect prior with a perfect decoder would reach.

    Own class: of held-out patches, as a training patch's nearest neighbor is another window of the same photo.
    """
    _, reference, _ = data_of(stored, config_of(next(iter(RECIPES)), stored, {}), psnr)
    images = torch.cat([part for _, part in batches(patches.train[:count])])
    scores = cloud_scores(reference.train[:count], psnr_bic(images), reference.train_classes[:count], reference)
    own = cloud_scores(reference.held_out[:count], psnr[:count], reference.classes[:count], reference)["own_class_share"]
    return {"recipe": "real training patches", **scores, "own_class_share": own}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| recipe | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in rows:
        cells = [_cell(name, row[name]) if name in row else "-" for name in COLUMNS]
        lines.append(f"| {row['recipe']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(name: str, value: float) -> str:
    if name == "samples":
        return f"{value:,}"
    return f"{value:+.2f} %" if name.endswith("percent") else f"{value:.3f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patches", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for features, results and sample sheets")
    parser.add_argument("--base", default="ddsr-tiny", help="base model whose autoencoder is used")
    parser.add_argument("--cpu-minutes", type=float, default=3.0, help="CPU time of one core per recipe")
    parser.add_argument("--samples", type=int, default=512, help="images drawn for a score")
    parser.add_argument("--most", type=int, default=None, help="use only this many patches (they are in random order)")
    parser.add_argument("--only", action="append", default=[], help="name of a recipe; all of them if not given")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    results = options.work / "results.jsonl"
    train, held_out = (np.load(options.patches / f"{name}.npy", mmap_mode="r") for name in ("train", "held_out"))
    patches = Patches(train[: options.most], held_out, {})
    stored = prepare(patches, options.base, options.work)
    psnr = torch.cat([psnr_bic(images) for _, images in batches(patches.held_out)])
    decoder = load_base(options.base).vae.decoder
    samples = min(options.samples, len(held_out))
    settings = {"score_samples": samples, "image_px": train.shape[1]}
    for name in options.only or RECIPES:
        if name not in {row["recipe"] for row in read(results)}:
            row = measure(name, stored, psnr, decoder, options, settings)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(table([real_row(stored, psnr, patches, samples), *read(results)]))


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


if __name__ == "__main__":
    main()
