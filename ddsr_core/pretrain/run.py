"""The `pretrain` stage: one function per phase, each leaving its result in ``out/resume``.

Beside the model, ``out/progress`` holds a CSV curve per phase, ``scores.csv`` and a sheet of samples for each score.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddsr_core.config import Runtime
from ddsr_core.diffusion.base import CLASSES, BaseInfo, save_base
from ddsr_core.diffusion.dit import DiT
from ddsr_core.errors import InputError
from ddsr_core.imaging.bicubic import psnr_bic
from ddsr_core.imaging.contact_sheet import contact_sheet
from ddsr_core.imaging.images import save_png, to_uint8
from ddsr_core.metrics.lpips import lpips_network
from ddsr_core.pretrain.autoencoder import AutoencoderTrainer, Phase, new_autoencoder, train_autoencoder
from ddsr_core.pretrain.checkpoints import check_settings, load_checkpoint, write_curve
from ddsr_core.pretrain.config import PHASE_FIELDS, PretrainConfig
from ddsr_core.pretrain.features import batches, describe, make_classes
from ddsr_core.pretrain.photos import cut_patches
from ddsr_core.pretrain.prior import PriorData, PriorTrainer, channel_statistics, encode_all, train_prior
from ddsr_core.pretrain.score import Reference, score
from ddsr_core.pseudo_labels.patch_features import PatchFeatures, nearest_class
from ddsr_core.reporters import Reporter, named
from ddsr_core.storage.files import write_json
from ddsr_core.storage.stage import RESUME, Stage, StageResult

STAGE_NAME = "pretrain"
PROGRESS = "progress"
FEATURES = "features.safetensors"
#: Samples on a sheet, and in a row of it.
SHEET_SAMPLES, SHEET_COLUMNS = 64, 16


@dataclass(frozen=True)
class Place:
    """The folders of a run, and how it shows progress.

    Attributes:
        out: the future base folder; ``work``: state to resume from; ``progress``: curves and sample sheets.
    """

    out: Path
    runtime: Runtime

    @property
    def work(self) -> Path:
        return self.out / RESUME

    @property
    def progress(self) -> Path:
        return self.out / PROGRESS

    def phase(self, name: str, config: PretrainConfig) -> Path:
        """The folder of a phase, checked to be of these settings."""
        names = list(PHASE_FIELDS)
        fields = [field for phase in names[: names.index(name) + 1] for field in PHASE_FIELDS[phase]]
        folder = self.work / name
        check_settings(folder, config.model_dump(mode="json", include=set(fields)))
        return folder


@dataclass(frozen=True)
class Patches:
    """Training and held-out patches, ``uint8 (N, px, px, 3)``, read from disk when used."""

    train: np.ndarray
    held_out: np.ndarray
    facts: dict[str, Any]


def run(config: PretrainConfig, *, photos: Path, out: Path, runtime: Runtime) -> StageResult:
    """Train a base model.

    Args:
        photos: folder of photographs.
        out: becomes a base folder (`ddsr_core.diffusion.base`), with ``curves.json`` and ``progress`` beside.

    Raises:
        ConfigError: ``out`` holds a run with other settings.
        InputError: the photos have no textured window, or are not those that the run was started with.
        TrainingError: a loss is not finite.
    """
    place = Place(out, runtime)
    patches = _patches(config, photos, place)
    vae = _autoencoder(config, patches, place)
    data, reference, unit = _prior_data(config, vae, patches, place)
    dit, scores = _prior(config, data, reference, vae.decoder, unit, place)
    info = BaseInfo(
        name=out.name, image_px=config.image_px, dit=dit.config.model_dump(), vae_class="AutoencoderTiny",
        latent_shift=tuple(unit[0].tolist()), latent_scale=tuple(unit[1].tolist()),
    )  # fmt: skip
    save_base(out, info, dit, vae)
    save_file({"centers": load_file(place.work / "features" / FEATURES)["centers"]}, out / CLASSES)
    write_json(out / "curves.json", {"scores": scores, "config": config.model_dump(mode="json"), **patches.facts})
    counts = {"patches": len(patches.train), "classes": config.classes, "skipped": patches.facts.get("skipped", {})}
    return StageResult(counts=counts)


def _patches(config: PretrainConfig, photos: Path, place: Place) -> Patches:
    """Cut the patches once. A training state without patches cuts them again and checks that they are the same."""
    folder = place.phase("patches", config)
    train, held_out, facts = folder / "train.npy", folder / "held_out.npy", folder / "facts.json"
    if not (train.exists() and held_out.exists()):
        cut = cut_patches(photos, config, place.runtime.progress)
        found = {
            "photos": cut.photos[0], "held_out_photos": cut.photos[1], "train_patches": len(cut.train),
            "held_out_patches": len(cut.held_out), "threshold_db": round(cut.threshold_db, 4),
            **({"skipped": cut.skipped} if cut.skipped else {}),
        }  # fmt: skip
        if facts.exists() and json.loads(facts.read_text()) != found:
            raise InputError(
                f"the photos are not those that this run started with: {json.loads(facts.read_text())} then, {found} now",
                where=photos,
                fix="use the same photos, or start a new run with another --out",
            )
        for path, pixels in ((held_out, cut.held_out), (train, cut.train)):
            np.save(path.with_suffix(".tmp.npy"), pixels)
            path.with_suffix(".tmp.npy").rename(path)
        write_json(facts, found)
    return Patches(np.load(train, mmap_mode="r"), np.load(held_out, mmap_mode="r"), json.loads(facts.read_text()))


def _autoencoder(config: PretrainConfig, patches: Patches, place: Place) -> AutoencoderTiny:
    """Phase 1, then phase 2, each with checkpoints and saved when it is done."""
    torch.manual_seed(config.seed)  # diffusers and torch initialize layers from the global generator only
    vae = new_autoencoder(config.vae_channels)
    weights = {
        "l1": 1.0, "edge": config.weight_edge, "lpips": config.weight_lpips, "scale": config.weight_scale,
        "adversarial": config.weight_adversarial,
    }  # fmt: skip
    phases = (
        ("autoencoder", config.vae_steps, config.vae_learning_rate, False),
        ("decoder", config.decoder_steps, config.vae_learning_rate / 4, True),
    )
    for name, steps, rate, adversarial in phases:
        folder = place.phase(name, config)
        if steps and not (folder / "config.json").exists():
            torch.manual_seed(config.seed)  # initialization of the discriminator
            trainer = AutoencoderTrainer(vae, lpips_network(), rate, config.latent_noise)
            if state := load_checkpoint(folder / "checkpoint.pt"):
                trainer.restore(state)
            phase = Phase(steps, config.vae_batch, rate, weights, adversarial, config.seed, config.vae_checkpoint_every)
            with (
                place.runtime.progress(f"Training the {name}", total=steps, unit="steps", done=trainer.done) as bar,
                place.runtime.reporter(f"pretrain-{name}", config.model_dump(mode="json")) as reporter,
            ):
                train_autoencoder(trainer, patches.train, phase, folder / "checkpoint.pt", bar, reporter)
            place.progress.mkdir(parents=True, exist_ok=True)
            write_curve(place.progress / f"{name}.csv", trainer.curve)
            vae.save_pretrained(folder)
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        if steps:
            vae = AutoencoderTiny.from_pretrained(folder, local_files_only=True)
    return vae.eval().requires_grad_(False)


def _prior_data(
    config: PretrainConfig, vae: AutoencoderTiny, patches: Patches, place: Place
) -> tuple[PriorData, Reference, tuple[Tensor, Tensor]]:
    """Latents, classes and features of all patches; shift and scale that make the latents normal, each ``(C,)``."""
    path = place.phase("features", config) / FEATURES
    if not path.exists():
        save_file(features_of(config, patches, place.runtime), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    stored = load_file(path)
    latents = encode_all(vae.encoder, patches.train, progress=place.runtime.progress)
    held_out = encode_all(vae.encoder, patches.held_out)[0]
    shift, scale = (torch.tensor(values) for values in channel_statistics(latents))
    shift_, scale_ = shift[:, None, None], scale[:, None, None]
    data = PriorData(((latents - shift_) * scale_).half(), stored["classes"], stored["tokens"])
    psnr = torch.cat([psnr_bic(images) for _, images in batches(patches.held_out)])
    reference = Reference(
        stored["held_out"], stored["held_out_classes"], psnr, stored["vectors"].float(), stored["classes"],
        (held_out.float() - shift_) * scale_,
    )  # fmt: skip
    return data, reference, (shift, scale)


def features_of(config: PretrainConfig, patches: Patches, runtime: Runtime) -> dict[str, Tensor]:
    """VGG16 features and k-means classes of training and held-out patches."""
    network = PatchFeatures(config.image_px, grid=config.image_px // 8)
    vectors, tokens = describe(patches.train, network, config.token_dims if config.repa_weight else 0, runtime.progress)
    classes, centers = make_classes(vectors, config.classes, config.seed)
    held_out, _ = describe(patches.held_out, network, 0)
    return {
        "vectors": vectors.half(), "tokens": tokens, "classes": classes, "centers": centers, "held_out": held_out,
        "held_out_classes": nearest_class(held_out, centers),
    }  # fmt: skip


def _prior(
    config: PretrainConfig,
    data: PriorData,
    reference: Reference,
    decoder: nn.Module,
    unit: tuple[Tensor, Tensor],
    place: Place,
) -> tuple[DiT, list[dict[str, float]]]:
    """Train the DiT; returns the averaged weights and the scores along the way."""
    path = place.phase("prior", config) / "checkpoint.pt"
    network = PatchFeatures(config.image_px, grid=config.image_px // 8)
    trainer = PriorTrainer(config, data)
    if state := load_checkpoint(path):
        trainer.restore(state)

    def on_score(trainer: PriorTrainer, reporter: Reporter) -> None:
        values, images = score(
            trainer.ema, decoder, unit, network, reference,
            samples=config.score_samples, steps=config.score_sampler_steps, seed=config.seed,
        )  # fmt: skip
        trainer.scores.append({"step": trainer.step, "samples": trainer.step * config.prior_batch, **values})
        place.progress.mkdir(parents=True, exist_ok=True)
        write_curve(place.progress / "scores.csv", trainer.scores)
        write_curve(place.progress / "prior.csv", trainer.curve)
        sheet = contact_sheet(list(to_uint8(images[:SHEET_SAMPLES])), columns=SHEET_COLUMNS, px=config.image_px)
        save_png(place.progress / f"samples-{trainer.step:07d}.png", sheet)
        reporter.scalars(named("score", values), trainer.step)
        reporter.picture("samples", place.progress / f"samples-{trainer.step:07d}.png", trainer.step)

    total = config.prior_steps
    with (
        place.runtime.progress("Training the prior", total=total, unit="steps", done=trainer.step) as bar,
        place.runtime.reporter("pretrain-prior", config.model_dump(mode="json")) as reporter,
    ):
        train_prior(trainer, path, bar, reporter, partial(on_score, reporter=reporter))
    return trainer.ema, trainer.scores


STAGE = Stage(STAGE_NAME, version=2, run=run, config=PretrainConfig)
