"""Latents to pixels: an image at a time, and in tiles where memory is short."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ddsr_core.diffusion.base import Base
from ddsr_core.errors import ConfigError
from ddsr_core.images import from_signed, to_uint8
from ddsr_core.tiling import enlarge

#: A tile and its neighbour share 1 / OVERLAP of a side with an AutoencoderKL (diffusers' own default), twice that with
#: an AutoencoderTiny.
OVERLAP = 4


def decode_pixels(model: Base, latents: Tensor, tile_px: int | None = None) -> np.ndarray:
    """Decode ``(B, C, h, w)`` to ``uint8 (B, H, W, 3)``, one image after the other: the decoder takes more memory than
    the DiT.

    Args:
        tile_px: see `decoder`.
    """
    decode = decoder(model, tile_px)
    return np.concatenate([to_uint8(from_signed(decode(latent[None]).float())) for latent in latents])


def decoder(model: Base, tile_px: int | None) -> Callable[[Tensor], Tensor]:
    """The model's decoder, in tiles where an image is larger than ``tile_px`` (image pixels; None never tiles).

    Tiles are an approximation. An ``AutoencoderKL`` has attention over, and group norms of, all that it sees: a tile
    is decoded as an image of its own, and diffusers blends the seams. An ``AutoencoderTiny`` is convolutional: a
    tile's outer quarter is thrown away, which is exact where that is its receptive field (about 18 latent pixels for
    TAESD) and leaves faint seams where it is less.

    Raises:
        ConfigError: ``tile_px`` is not a multiple of `OVERLAP` latent pixels: diffusers' tiles would not meet.
    """
    if tile_px is None:
        return model.decode
    factor = model.image_px // model.dit.config.latent_px
    if tile_px % (OVERLAP * factor):
        raise ConfigError(
            f"tiles of {tile_px} px do not fit a VAE of {factor} px a latent pixel",
            where="sample.decode_tile_px",
            mend=f"choose a multiple of {OVERLAP * factor}",
        )
    side = tile_px // factor
    if model.codec.is_tiny:  # diffusers' tiles for this class hold for VAEs of 8 px a latent pixel alone
        return partial(enlarge, model.decode, scale=factor, tile_px=side, overlap_px=side // OVERLAP)
    vae = model.vae
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor = tile_px, side, 1 / OVERLAP
    return model.decode
