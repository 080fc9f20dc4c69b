"""Small random models written in exactly the layouts that DiT and its VAEs are published in."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiTTransformer2DModel

from ddsr_core.diffusion.dit import DiT, DiTConfig
from ddsr_core.diffusion.layouts import to_diffusers
from tests.helpers.tiny_base import tiny_dit

#: Latents of 8 px under a VAE that halves three times: images of 64 px.
SHAPE = DiTConfig(latent_px=8, hidden=32, depth=3, heads=4, classes=1000)


def randomize(module: torch.nn.Module, seed: int, scale: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def small_kl(seed: int = 0) -> AutoencoderKL:
    """Stable Diffusion's VAE in miniature: four levels, group norms, attention in the middle."""
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=4, latent_channels=4,
        scaling_factor=0.18215, sample_size=64,
    )  # fmt: skip
    randomize(vae, seed)
    return vae


def small_taesd(seed: int = 0) -> AutoencoderTiny:
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8), num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1), latent_channels=4, scaling_factor=1.0,
    )  # fmt: skip
    randomize(vae, seed)
    return vae


def diffusers_dit(model: DiT) -> DiTTransformer2DModel:
    """diffusers' module with the weights of ours, its two deviations from the original set right."""
    c = model.config
    twin = DiTTransformer2DModel(
        num_attention_heads=c.heads, attention_head_dim=c.hidden // c.heads, in_channels=c.in_channels, num_layers=c.depth,
        out_channels=2 * c.in_channels, sample_size=c.latent_px, patch_size=c.patch, num_embeds_ada_norm=c.classes,
    )  # fmt: skip
    twin.load_state_dict(to_diffusers(model.state_dict(), c.depth), strict=False)
    for block in twin.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    return twin.eval()


def write_diffusers(folder: Path, model: DiT | None = None, safe: bool = True) -> Path:
    """As ``facebook/DiT-XL-2-512`` is laid out; ``safe``: safetensors or ``.bin``."""
    model = model or tiny_dit(shape=SHAPE)
    diffusers_dit(model).save_pretrained(folder / "transformer", safe_serialization=safe)
    small_kl().save_pretrained(folder / "vae", safe_serialization=safe)
    names = {str(row): f"thing {row}, stuff" for row in range(model.config.classes)}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", "id2label": names}))
    return folder


def write_original(path: Path, model: DiT | None = None) -> Path:
    """As ``DiT-XL-2-512x512.pt`` is: a bare state dict, saved by torch."""
    model = model or tiny_dit(shape=SHAPE)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: value.clone() for name, value in model.state_dict().items()}, path)
    path.with_suffix(".json").write_text(json.dumps({"heads": model.config.heads}))
    return path
