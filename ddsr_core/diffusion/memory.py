"""How a fine-tuning step fits into a GPU's memory: what is stored for the backward pass, and what is recomputed instead.

Estimates for DiT-XL/2-512 per image of 512 px: the DiT stores 1.98 GiB in float32 and 0.99 GiB in bfloat16, the decoder of
Stable Diffusion's VAE 5.6 GiB or 2.8 GiB (a window of 256 px a quarter of that), TAESD's decoder 0.54 GiB or 0.27 GiB.
Preset ``paper`` (batch 8, float32, a window of 256 px through the VAE) on a card of 24 GB: weights 2.7 GiB; the DiT's
activations would be 15.8 GiB and the decoder's 11.2 GiB. With the decoder one image at a time (1.4 GiB) and the blocks
recomputed (8 x 0.13 GiB and one block at a time, 0.6 GiB) the step needs 5.7 GiB in all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddsr_core.diffusion.codec import Codec
from ddsr_core.diffusion.config import Checkpointing, FinetuneConfig
from ddsr_core.diffusion.dit import DiTConfig

#: Numbers that DiffFit's backward pass needs per token, width and block, with fused attention; measured on DiT-XL/2.
STORED_PER_TOKEN = 16
#: Share of the free GPU memory that activations may take.
MEMORY_SHARE = 0.7
#: Sides, in latent pixels, of the latents on which a decoder's activations are counted.
PROBES_PX = (8, 16)


def choose_checkpointing(config: FinetuneConfig, shape: DiTConfig, decoder: Codec, free_bytes: int | None) -> Checkpointing:
    """Resolve ``config.checkpointing="auto"``: the cheapest way whose activations fit `MEMORY_SHARE` of free memory.

    ``decoder`` is tried before ``on``, since it recomputes less. If nothing fits, it is ``on``.

    Args:
        shape: of the DiT.
        decoder: VAE that L_SR decodes with.
        free_bytes: free memory of the GPU with the networks loaded; None on a CPU, where nothing is recomputed by default.

    Returns:
        ``off``, ``decoder`` or ``on``; the config's own value if it is not ``auto``.
    """
    if config.checkpointing != "auto":
        return config.checkpointing
    if free_bytes is None:
        return "off"
    of_image = 0
    if config.lsr_mode != "off" and config.lambda_sr > 0:
        of_image = decoder_bytes(decoder, config.lsr_crop_px or shape.latent_px, config.precision == "bf16")
    for choice in ("off", "decoder"):
        if activation_bytes(config, shape, of_image, choice) <= MEMORY_SHARE * free_bytes:
            return choice
    return "on"


def activation_bytes(config: FinetuneConfig, shape: DiTConfig, decoder_image_bytes: int, choice: Checkpointing) -> int:
    """Bytes that are stored for the backward pass of one part of a batch.

    Args:
        decoder_image_bytes: `decoder_bytes`; 0 without L_SR.
        choice: ``off``, ``decoder`` or ``on``.
    """
    images = config.batch_size // (config.accumulate * config.processes)
    tokens = images * (shape.latent_px // shape.patch) ** 2 * shape.hidden
    of_dit = tokens * shape.depth * STORED_PER_TOKEN * (2 if config.precision == "bf16" else 4)
    if choice == "on":  # the float32 input of every block, and the inside of one
        of_dit = tokens * shape.depth * 4 + of_dit // shape.depth
    return of_dit + decoder_image_bytes * (images if choice == "off" else 1)


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a GPU; None for a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free


def decoder_bytes(decoder: Codec, latent_px: int, half: bool) -> int:
    """Bytes that a decoder stores for the backward pass of one image, extrapolated by area from two small latents.

    What does not grow with the image, such as weights rounded to bfloat16, is counted once.
    """
    small, large = (_stored_bytes(decoder, side, half) for side in PROBES_PX)
    areas = [side**2 for side in PROBES_PX]
    return small + (large - small) * (latent_px**2 - areas[0]) // (areas[1] - areas[0])


def _stored_bytes(decoder: Codec, latent_px: int, half: bool) -> int:
    parameters = list(decoder.vae.decoder.parameters())
    frozen = {parameter.untyped_storage()._cdata for parameter in parameters}
    stored: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in frozen:
            stored[storage._cdata] = storage.nbytes()
        return x

    latent = torch.zeros(1, len(decoder.scale), latent_px, latent_px, device=parameters[0].device, requires_grad=True)
    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(count, lambda x: x),
        torch.autocast(latent.device.type, torch.bfloat16, enabled=half),
    ):
        image = decoder.decode(latent)
    del image  # until here the graph keeps what was counted, so that no address is used twice
    return sum(stored.values())
