"""Latents to pixels: one image at a time, and in tiles if memory is short."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from torch import Tensor

from ddsr_core.diffusion.base import Base
from ddsr_core.errors import ConfigError
from ddsr_core.imaging.images import from_signed, to_uint8
from ddsr_core.imaging.tiling import enlarge


def decode_pixels(model: Base, latents: Tensor, tile_px: int | None = None) -> np.ndarray:
    """Decode ``(B, C, h, w)`` to ``uint8 (B, H, W, 3)``, one image at a time, since a decoder's feature maps are large.

    Args:
        tile_px: see `decoder`.
    """
    decode = decoder(model, tile_px)
    return np.concatenate([to_uint8(from_signed(decode(latent[None]).float())) for latent in latents])


def decoder(model: Base, tile_px: int | None) -> Callable[[Tensor], Tensor]:
    """The model's decoder, which works in tiles if an image is larger than ``tile_px`` (image pixels; None never tiles).

    The outer quarter of a tile is decoded and discarded. That is exact for a convolutional decoder whose receptive field
    ends there (TAESD sees 18 latent pixels: tiles of 600 px), and close for smaller tiles. An ``AutoencoderKL`` has group
    norms and attention over its whole input, so the contrast of a tile can differ from that of the whole image. The tiles
    of diffusers do the same but may end in a narrow strip: on a small random KL VAE their error was twice as large.

    Raises:
        ConfigError: ``tile_px`` is not a multiple of the size of a latent pixel.
    """
    if tile_px is None:
        return model.decode
    factor = model.image_px // model.dit.config.latent_px
    if tile_px % factor:
        raise ConfigError(
            f"tiles of {tile_px} px do not fit a VAE of {factor} px per latent pixel",
            where="sample.decode_tile_px",
            fix=f"choose a multiple of {factor}",
        )
    side = tile_px // factor
    return partial(enlarge, model.decode, scale=factor, tile_px=side, overlap_px=side // 4)
