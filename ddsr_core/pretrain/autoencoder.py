"""The VAE of `ddsr-tiny`: diffusers' `AutoencoderTiny` at x4, trained in two phases.

1. Encoder and decoder: L1, an edge term (L1 of finite differences) and LPIPS, on latents with a little noise.
2. Decoder alone, the encoder frozen, with an adversarial term added: a decoder that blurs affects PSNR_bic more
   than anything that the diffusion model does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ddsr_core.errors import TrainingError
from ddsr_core.pretrain.checkpoints import save_checkpoint
from ddsr_core.progress import Bar
from ddsr_core.reporters import Reporter, named

#: Steps between two rows of the curve.
CURVE_EVERY = 25


def new_autoencoder(channels: int, decoder_blocks: tuple[int, ...] = (3, 3, 1)) -> AutoencoderTiny:
    """An untrained x4 autoencoder: ``(B, 3, 4h, 4w)`` in [-1, 1] to ``(B, 4, h, w)`` and back."""
    return AutoencoderTiny(
        encoder_block_out_channels=(channels,) * 3,
        decoder_block_out_channels=(channels,) * 3,
        num_encoder_blocks=(1, 2, 3),
        num_decoder_blocks=decoder_blocks,
        latent_channels=4,
    )


class PatchDiscriminator(nn.Sequential):
    """Small spectral-norm PatchGAN: ``(B, 3, H, W)`` in [-1, 1] to logits ``(B, 1, H/4, W/4)``."""

    def __init__(self, channels: int = 32) -> None:
        def conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Module:
            return spectral_norm(nn.Conv2d(inputs, outputs, kernel, stride, 1))

        super().__init__(
            conv(3, channels, 3, 1), nn.LeakyReLU(0.2),
            conv(channels, 2 * channels, 4, 2), nn.LeakyReLU(0.2),
            conv(2 * channels, 4 * channels, 4, 2), nn.LeakyReLU(0.2),
            conv(4 * channels, 4 * channels, 3, 1), nn.LeakyReLU(0.2),
            conv(4 * channels, 1, 3, 1),
        )  # fmt: skip


def edge_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean L1 distance of the horizontal and vertical finite differences of two image batches."""
    return (x.diff(dim=-1) - y.diff(dim=-1)).abs().mean() + (x.diff(dim=-2) - y.diff(dim=-2)).abs().mean()


def batch_of(patches: np.ndarray, size: int, seed: int, step: int) -> Tensor:
    """Batch ``step``: random patches, flipped and turned, ``float (B, 3, H, W)`` in [-1, 1]."""
    rng = np.random.default_rng((seed, step))
    batch = torch.from_numpy(patches[rng.integers(len(patches), size=size)]).permute(0, 3, 1, 2)
    batch = batch.rot90(int(rng.integers(4)), (2, 3))
    batch = batch.flip(3) if rng.integers(2) else batch
    return batch.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


class AutoencoderTrainer:
    """The state of one phase: networks, optimizers, steps done, curve."""

    PARTS = ("vae", "discriminator", "optimizer", "optimizer_d")

    def __init__(self, vae: AutoencoderTiny, perceptual: nn.Module, learning_rate: float, latent_noise: float) -> None:
        self.vae = vae.to(memory_format=torch.channels_last)
        self.discriminator = PatchDiscriminator().to(memory_format=torch.channels_last)
        self.perceptual = perceptual.requires_grad_(False).eval()
        self.latent_noise = latent_noise
        self.optimizer = torch.optim.Adam(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), fused=True)
        self.optimizer_d = torch.optim.Adam(
            self.discriminator.parameters(), lr=2 * learning_rate, betas=(0.5, 0.9), fused=True
        )
        self.done = 0
        self.curve: list[dict[str, float]] = []

    def checkpoint(self) -> dict[str, Any]:
        """Everything that `restore` needs."""
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        return {"done": self.done, "curve": self.curve, **parts}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `checkpoint`."""
        self.done, self.curve = state["done"], state["curve"]
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])

    def decode_noisy(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Decode latents with a little noise, so that the decoder tolerates errors of the diffusion model."""
        noise = torch.randn(latents.shape, generator=generator)
        return self.vae.decoder(latents + self.latent_noise * noise)

    def reconstruction_terms(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        return {
            "l1": (real - fake).abs().mean(),
            "edge": edge_loss(real, fake),
            "lpips": self.perceptual(real, fake.clamp(-1, 1)).mean(),
        }

    def step(
        self, real: Tensor, weights: dict[str, float], generator: torch.Generator, adversarial: bool
    ) -> dict[str, float]:
        """One optimizer step of phase 1 (``adversarial`` false) or phase 2. Returns each term's value."""
        with torch.autocast("cpu", torch.bfloat16):
            if adversarial:
                with torch.no_grad():
                    latents = self.vae.encoder(real)
            else:
                latents = self.vae.encoder(real)
            latents = latents.float()
            fake = self.decode_noisy(latents, generator)
            terms = self.reconstruction_terms(real, fake.float())
            if adversarial:
                terms["adversarial"] = -self.discriminator(fake).float().mean()
            else:
                # Unit variance and zero mean for each channel: what the diffusion schedule expects of a latent.
                mean, var = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
                terms["scale"] = mean.square().mean() + (var.log()).square().mean()
            loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        self._update(self.optimizer, self.vae, loss, terms)
        if adversarial:
            with torch.autocast("cpu", torch.bfloat16):
                margin_real = F.relu(1 - self.discriminator(real)).float().mean()
                margin_fake = F.relu(1 + self.discriminator(fake.detach())).float().mean()
            terms["discriminator"] = margin_real + margin_fake
            self._update(self.optimizer_d, self.discriminator, terms["discriminator"], terms)
        return {name: float(term.detach()) for name, term in terms.items()}

    @staticmethod
    def _update(optimizer: torch.optim.Optimizer, module: nn.Module, loss: Tensor, terms: dict[str, Tensor]) -> None:
        for name, term in terms.items():
            if not torch.isfinite(term):
                raise TrainingError(
                    f"the term {name!r} of the autoencoder's loss is not finite",
                    fix="lower the learning rate",
                )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()


@dataclass(frozen=True)
class Phase:
    """One phase of the training.

    Attributes:
        steps: how many there are.
        learning_rate: at its start; it falls along a cosine.
        weights: of the terms of the loss.
        adversarial: phase 2 (the decoder alone, with a discriminator) instead of phase 1.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weights: dict[str, float]
    adversarial: bool
    seed: int
    checkpoint_every: int


def train_autoencoder(
    trainer: AutoencoderTrainer, patches: np.ndarray, phase: Phase, path: Path, bar: Bar, reporter: Reporter
) -> None:
    """Run a phase to its end, from the checkpoint in ``path`` if there is one."""
    generator = torch.Generator()
    trainer.vae.encoder.requires_grad_(not phase.adversarial)
    while trainer.done < phase.steps:
        step = trainer.done
        rate = phase.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / phase.steps)))
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate
        generator.manual_seed(phase.seed * 1_000_003 + step)
        batch = batch_of(patches, phase.batch_size, phase.seed, step)
        terms = trainer.step(batch, phase.weights, generator, phase.adversarial)
        trainer.done += 1
        if step % CURVE_EVERY == 0:
            trainer.curve.append({"step": step, **terms})
            reporter.scalars({**named("train", terms), "train/learning_rate": rate}, step)
            bar.note(" ".join(f"{name} {value:.3f}" for name, value in terms.items()))
        if trainer.done % phase.checkpoint_every == 0 and trainer.done < phase.steps:
            save_checkpoint(path, trainer.checkpoint())
        bar.advance()
