"""A base model of 16-pixel images with random weights, and patches and clusters to go with it: milliseconds per step."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderTiny

from ddsr_core.config import Runtime
from ddsr_core.diffusion import latents
from ddsr_core.diffusion.base import BaseInfo, save_base
from ddsr_core.diffusion.config import LatentsConfig
from ddsr_core.diffusion.dit import DiT, DiTConfig
from ddsr_core.imaging.image_sets import write_image_parquet
from ddsr_core.imaging.images import encode_png

IMAGE_PX = 16
SHAPE = DiTConfig(latent_px=4, hidden=16, depth=3, heads=2, classes=12)


def tiny_dit(seed: int = 0, shape: DiTConfig = SHAPE) -> DiT:
    """A DiT whose every parameter is random: with the usual zero output layer nothing would depend on anything."""
    model = DiT(shape)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write_base(folder: Path, seed: int = 0) -> Path:
    channels = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    vae = AutoencoderTiny(
        **channels, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    info = BaseInfo(
        name="tiny", image_px=IMAGE_PX, dit=SHAPE.model_dump(), vae_class="AutoencoderTiny",
        latent_shift=(0.0,) * 4, latent_scale=(1.0,) * 4,
    )  # fmt: skip
    save_base(folder, info, tiny_dit(seed), vae)
    return folder


def write_patches(folder: Path, count: int = 24, side: int = IMAGE_PX) -> Path:
    generator = np.random.default_rng(0)
    rows = []
    for index in range(count):
        smooth = generator.integers(40, 200, (side // 4, side // 4, 3)).repeat(4, 0).repeat(4, 1)
        image = (smooth + generator.integers(0, 40, (side, side, 3))).astype(np.uint8)
        rows.append({"image": encode_png(image), "patch_id": f"{index:016x}_0_0"})
    folder.mkdir(parents=True, exist_ok=True)
    write_image_parquet(folder / "patches-00000.parquet", rows, {"patch_id": pa.string()})
    return folder


def write_clusters(folder: Path, count: int = 24, k: int = 3) -> Path:
    labels = np.sort(np.arange(count) % k).astype(np.int32)
    buffer = io.BytesIO()
    pq.write_table(pa.table({"patch_id": [f"{i:016x}_0_0" for i in range(count)], "pseudo_label": labels}), buffer)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.parquet").write_bytes(buffer.getvalue())
    (folder / "summary.json").write_text(json.dumps({"k": k, "sizes": np.bincount(labels, minlength=k).tolist()}))
    return folder


def write_latents(folder: Path, patches: Path, base: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    latents.run(LatentsConfig(batch_size=8), patches=patches, base=base, out=folder, runtime=Runtime())
    return folder
