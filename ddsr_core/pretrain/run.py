"""The `pretrain` stage: one function a phase, each leaving its result in ``out/resume``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddsr_core.config import Runtime
from ddsr_core.diffusion.base import BaseInfo, save_base
from ddsr_core.diffusion.dit import DiT, DiTConfig
from ddsr_core.metrics.lpips import lpips_network
from ddsr_core.pretrain.autoencoder import AutoencoderTrainer, new_autoencoder, train_autoencoder
from ddsr_core.pretrain.config import PretrainConfig
from ddsr_core.pretrain.photos import textured_patches
from ddsr_core.pretrain.prior import PriorData, channel_statistics, encode_all, train_prior
from ddsr_core.storage.files import write_json
from ddsr_core.storage.stage import RESUME, Stage, StageResult

STAGE_NAME = "pretrain"


def run(config: PretrainConfig, *, photos: Path, out: Path, runtime: Runtime) -> StageResult:
    """Train a base model.

    Args:
        photos: folder of photographs.
        out: becomes a base folder (`ddsr_core.diffusion.base`), with ``curves.json`` beside.

    Raises:
        InputError: the photos have no textured window.
        TrainingError: a loss is not finite.
    """
    work = out / RESUME
    work.mkdir(parents=True, exist_ok=True)
    patches = _patches(config, photos, work, runtime)
    vae, curves = _autoencoder(config, patches, work, runtime)
    data, shift, scale = _latents(config, vae, patches, work, runtime)
    dit, curves["prior"] = _prior(config, data, work, runtime)
    info = BaseInfo(
        name=out.name,
        image_px=config.image_px,
        dit=dit.config.model_dump(),
        vae_class="AutoencoderTiny",
        latent_shift=tuple(shift),
        latent_scale=tuple(scale),
    )
    save_base(out, info, dit, vae)
    write_json(out / "curves.json", curves)
    return StageResult(counts={"patches": len(patches), "classes": config.classes})


def _patches(config: PretrainConfig, photos: Path, work: Path, runtime: Runtime) -> np.ndarray:
    path = work / "patches.npy"
    if not path.exists():
        patches = textured_patches(
            photos,
            window_px=config.image_px,
            stride_px=config.stride_px,
            below_db=config.below_db,
            short_sides_px=config.short_sides_px,
            least_reduction=config.least_reduction,
            most=config.most_patches,
            seed=config.seed,
            progress=runtime.progress,
        )
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, patches)
        temporary.rename(path)
    return np.load(path, mmap_mode="r")


def _autoencoder(
    config: PretrainConfig, patches: np.ndarray, work: Path, runtime: Runtime
) -> tuple[AutoencoderTiny, dict[str, Any]]:
    """Phase 1, then phase 2, each saved when it is done."""
    curves: dict[str, Any] = {}
    torch.manual_seed(config.seed)  # diffusers and torch initialise layers from the global generator only
    vae = new_autoencoder(config.vae_channels)
    phases = (
        ("autoencoder", config.vae_steps, config.vae_learning_rate, False),
        ("decoder", config.decoder_steps, config.vae_learning_rate / 4, True),
    )
    for name, steps, rate, adversarial in phases:
        folder = work / name
        if not (folder / "curve.json").exists() and steps:
            trainer = AutoencoderTrainer(vae, lpips_network(), rate, config.latent_noise)
            weights = {
                "l1": 1.0,
                "edge": config.weight_edge,
                "lpips": config.weight_lpips,
                "scale": config.weight_scale,
                "adversarial": config.weight_adversarial,
            }
            with runtime.progress(f"Training the {name}", total=steps, unit="steps") as bar:
                curve = train_autoencoder(
                    trainer, patches, steps=range(steps), total=steps, batch_size=config.vae_batch,
                    learning_rate=rate, weights=weights, adversarial=adversarial, seed=config.seed, bar=bar,
                )  # fmt: skip
            vae.save_pretrained(folder)
            write_json(folder / "curve.json", curve[::25])
        if steps:
            vae = AutoencoderTiny.from_pretrained(folder, local_files_only=True)
            curves[name] = json.loads((folder / "curve.json").read_text())
    return vae.eval().requires_grad_(False), curves


def patch_features(patches: np.ndarray, runtime: Runtime, batch: int = 256) -> np.ndarray:
    """AlexNet conv5 features, average-pooled and normalised: ``float32 (N, 256)``. Good enough to sort textures by."""
    trunk: Any = lpips_network().net
    features: list[Tensor] = []
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with (
        runtime.progress("Describing patches", total=len(patches), unit="patches") as bar,
        torch.inference_mode(),
    ):
        for start in range(0, len(patches), batch):
            chunk = torch.from_numpy(np.array(patches[start : start + batch])).float() / 255
            maps = trunk(((chunk - mean) / std).permute(0, 3, 1, 2))[-1]
            features.append(torch.nn.functional.normalize(maps.mean((2, 3)), dim=1))
            bar.advance(len(chunk))
    return torch.cat(features).numpy()


def _latents(
    config: PretrainConfig, vae: AutoencoderTiny, patches: np.ndarray, work: Path, runtime: Runtime
) -> tuple[PriorData, list[float], list[float]]:
    """Normalised latents of all patches and their k-means classes."""
    path = work / "latents.safetensors"
    if not path.exists():
        from sklearn.cluster import MiniBatchKMeans

        latents = encode_all(vae.encoder, patches, progress=runtime.progress)
        kmeans = MiniBatchKMeans(config.classes, random_state=config.seed, n_init=3, batch_size=4096)
        classes = torch.from_numpy(kmeans.fit_predict(patch_features(patches, runtime))).long()
        save_file({"latents": latents, "classes": classes}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    stored = load_file(path)
    shift, scale = channel_statistics(stored["latents"])
    per_channel = (None, None, slice(None), None, None)
    normal = (stored["latents"] - torch.tensor(shift)[per_channel]) * torch.tensor(scale)[per_channel]
    return PriorData(normal.half(), stored["classes"]), shift, scale


def _prior(config: PretrainConfig, data: PriorData, work: Path, runtime: Runtime) -> tuple[DiT, list[dict[str, float]]]:
    """Train the DiT, with a checkpoint every ``checkpoint_every`` steps; returns the averaged weights."""
    shape = DiTConfig(
        latent_px=data.latents.shape[-1],
        hidden=config.hidden,
        depth=config.depth,
        heads=config.heads,
        classes=config.classes,
    )
    model, ema = DiT(shape), DiT(shape)
    model.initialize(torch.Generator().manual_seed(config.seed))
    ema.load_state_dict(model.state_dict())
    ema.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.prior_learning_rate,
        weight_decay=0.0,
        fused=True,
    )
    checkpoint, done, curve = work / "prior.pt", 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        done, curve = state["step"], state["curve"]
    with runtime.progress("Training the prior", total=config.prior_steps, unit="steps", done=done) as bar:
        while done < config.prior_steps:
            stop = min(done + config.checkpoint_every, config.prior_steps)
            curve += train_prior(
                model, ema, optimizer, data, steps=range(done, stop), total=config.prior_steps,
                batch_size=config.prior_batch, learning_rate=config.prior_learning_rate, warmup=config.prior_warmup,
                label_dropout=config.label_dropout, ema_decay=config.ema_decay, seed=config.seed, bar=bar,
            )  # fmt: skip
            done = stop
            state = {
                "model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
                "step": done, "curve": curve,
            }  # fmt: skip
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").rename(checkpoint)
    return ema, curve


STAGE = Stage(STAGE_NAME, version=1, run=run, config=PretrainConfig)
