"""Decoding in tiles: exact where it can be, near where it cannot."""

import numpy as np
import pytest
import torch

from ddsr_core.diffusion.base import Base, BaseInfo
from ddsr_core.diffusion.codec import Codec
from ddsr_core.diffusion.decoding import decode_pixels, decoder
from ddsr_core.diffusion.dit import DiTConfig
from ddsr_core.errors import ConfigError
from tests.helpers.published_models import small_kl
from tests.helpers.tiny_base import tiny_dit

LATENT_PX = 32


def base_of(vae: torch.nn.Module, factor: int) -> Base:
    dit = tiny_dit(shape=DiTConfig(latent_px=LATENT_PX, hidden=16, depth=1, heads=2, classes=3))
    info = BaseInfo(
        name="", image_px=LATENT_PX * factor, dit={}, vae_class=type(vae).__name__, latent_shift=(0.0,) * 4,
        latent_scale=(1.0,) * 4,
    )  # fmt: skip
    return Base(dit, Codec(vae.eval().requires_grad_(False), (0.0,) * 4, (1.0,) * 4), info, "", {})


def small_taesd(blocks: int) -> torch.nn.Module:
    """Three levels (x4), a decoder whose every convolution passes on about as much as it takes in."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(blocks, blocks, 1),
    )  # fmt: skip


def latents(count: int = 2) -> torch.Tensor:
    return torch.randn((count, 4, LATENT_PX, LATENT_PX), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_one_image_at_a_time_are_the_pixels_of_all_at_once():
    base = base_of(small_taesd(1), 4)
    seen: list[int] = []
    base.vae.decoder.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    found = decode_pixels(base, latents(3))
    assert seen == [1, 1, 1]
    whole = base.decode(latents(3)).add(1).div(2).mul(255).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert found.shape == (3, 128, 128, 3)
    assert np.abs(found - whole).max() <= 1


@torch.no_grad()
def test_tiles_of_a_convolutional_decoder_are_exact_beyond_its_receptive_field():
    base = base_of(small_taesd(1), 4)  # 3 + 4 / 2 + 5 / 4 + ... = 7.25 latent pixels, under a quarter of 32 - 4
    whole = base.decode(latents())
    largest: list[int] = []
    base.vae.decoder.register_forward_hook(lambda _, args, __: largest.append(args[0].shape[-1]))
    tiled = decoder(base, 112)(latents())
    assert set(largest) == {28}
    torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_smaller_tiles_of_a_convolutional_decoder_are_near():
    base = base_of(small_taesd(3), 4)
    whole, tiled = base.decode(latents()), decoder(base, 64)(latents())
    assert 0 < (tiled - whole).abs().mean() < 0.01 * whole.std()


def natural(vae: torch.nn.Module) -> torch.nn.Module:
    """The layers' usual random weights: with large ones a small VAE is chaotic."""
    torch.manual_seed(0)
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear | torch.nn.GroupNorm):
            module.reset_parameters()
    return vae


@torch.no_grad()
def test_tiles_of_a_kl_decoder_come_nearer_to_the_whole_the_larger_they_are():
    base = base_of(natural(small_kl()), 8)
    whole = base.decode(latents(1))
    largest: list[int] = []
    base.vae.decoder.register_forward_hook(lambda _, args, __: largest.append(args[0].shape[-1]))
    error = {px: float((decoder(base, px)(latents(1)) - whole).abs().mean() / whole.std()) for px in (128, 224)}
    assert set(largest) == {16, 28}
    assert 0 < error[224] < 0.05
    assert error[224] < error[128] < 0.15


@torch.no_grad()
def test_tiles_of_a_kl_decoder_are_nearer_than_those_of_diffusers():
    base = base_of(natural(small_kl()), 8)
    whole, tiled = base.decode(latents(1)), decoder(base, 128)(latents(1))
    base.vae.enable_tiling()
    base.vae.tile_sample_min_size, base.vae.tile_latent_min_size = 128, 16
    theirs = base.decode(latents(1))
    assert (tiled - whole).abs().mean() < 0.7 * (theirs - whole).abs().mean()


@torch.no_grad()
def test_an_image_no_larger_than_a_tile_is_decoded_whole():
    for base, factor in ((base_of(small_taesd(1), 4), 4), (base_of(small_kl(), 8), 8)):
        whole = base.decode(latents(1))
        assert torch.equal(decoder(base, LATENT_PX * factor)(latents(1)), whole)


def test_tiles_of_half_a_latent_pixel_are_refused():
    with pytest.raises(ConfigError, match="choose a multiple of 8"):
        decoder(base_of(small_kl(), 8), 100)
