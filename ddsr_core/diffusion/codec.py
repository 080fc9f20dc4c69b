"""The autoencoder between images and diffusion latents: the VAEs of diffusers, and the scale that ties them to a DiT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddsr_core.diffusion import published
from ddsr_core.errors import InputError
from ddsr_core.imaging.bicubic import per_channel


@dataclass(frozen=True)
class Codec:
    """A VAE and the affine map between its latents and the diffusion's (of about unit variance).

    Attributes:
        vae: ``AutoencoderKL`` or ``AutoencoderTiny`` of diffusers, frozen, in evaluation mode, float32.
        shift, scale: diffusion latent = (VAE latent - shift) * scale, one number per channel.
    """

    vae: Any
    shift: tuple[float, ...]
    scale: tuple[float, ...]

    @property
    def is_tiny(self) -> bool:
        return type(self.vae).__name__ == "AutoencoderTiny"

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The posterior of ``float (B, 3, H, W)`` in [-1, 1]: mean and log variance ``(B, C, h, w)``, diffusion units.

        The log variance of an ``AutoencoderTiny`` is None.
        """
        if self.is_tiny:
            return self._scaled(self.vae.encoder(images)), None
        posterior = self.vae.encode(images).latent_dist
        scale = per_channel(self.scale, posterior.mean)
        return self._scaled(posterior.mean), posterior.logvar + 2 * scale.abs().log()

    def encode(self, images: Tensor) -> Tensor:
        """Mean latents ``(B, C, h, w)``."""
        return self.moments(images)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)``, about [-1, 1], not clamped; differentiable."""
        raw = latents / per_channel(self.scale, latents) + per_channel(self.shift, latents)
        return self.vae.decoder(raw) if self.is_tiny else self.vae.decode(raw).sample

    def _scaled(self, raw: Tensor) -> Tensor:
        return (raw - per_channel(self.shift, raw)) * per_channel(self.scale, raw)

    def pixels_per_latent(self) -> int:
        """Image pixels along one latent pixel: 8 for Stable Diffusion's VAE."""
        with torch.inference_mode():
            return int(self.decode(torch.zeros(1, len(self.scale), 4, 4)).shape[-1]) // 4


def load_codec(folder: Path, device: str = "cpu") -> Codec:
    """A published VAE (``AutoencoderKL`` or ``AutoencoderTiny``, diffusers' layout), frozen, float32, with its scale.

    Raises:
        MissingWeightsError, InputError: files are missing or damaged.
    """
    published.locate(str(folder), (".",), "vae")
    vae = load_vae(folder).to(device)
    channels = vae.config.latent_channels
    scale = float(vae.config.scaling_factor)
    shift = float(getattr(vae.config, "shift_factor", None) or 0.0)
    return Codec(vae, (shift,) * channels, (scale,) * channels)


def load_vae(folder: Path) -> Any:
    """A VAE of diffusers, frozen, float32, in evaluation mode.

    Raises:
        InputError: another class, or damaged files.
    """
    kind = published.read_json(folder / published.CONFIG).get("_class_name")
    if kind not in ("AutoencoderKL", "AutoencoderTiny"):
        raise InputError(
            f"{kind!r} is not a VAE that a base model can use",
            where=folder / published.CONFIG,
            fix="name the folder of an AutoencoderKL or an AutoencoderTiny",
        )
    weights = published.find_weights(folder)
    published.read_tensors(weights or folder)  # a damaged file fails here, with one message
    try:
        vae = getattr(published.import_diffusers(), kind).from_pretrained(
            folder, local_files_only=True, use_safetensors=weights is not None and weights.suffix == ".safetensors"
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"the VAE cannot be loaded: {error}", where=folder, fix="download its files again") from error
    return vae.float().requires_grad_(False).eval()
