"""What is recomputed in the backward pass, and the estimates that decide it."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from ddsr_core.diffusion.codec import Codec
from ddsr_core.diffusion.config import FinetuneConfig
from ddsr_core.diffusion.dit import DIT_XL_2_512
from ddsr_core.diffusion.memory import activation_bytes, choose_checkpointing, decoder_bytes
from ddsr_core.pipeline.config import load_config
from tests.helpers.published_models import small_kl

GIB = 2**30
#: Weights of DiT-XL/2 and both VAEs in float32, and what CUDA itself takes.
LOADED_GIB = 3.5


def codec(vae: torch.nn.Module) -> Codec:
    return Codec(vae.requires_grad_(False).eval(), (0.0,) * 4, (1.0,) * 4)


@pytest.fixture(scope="module")
def decoders() -> dict[str, Codec]:
    """Stable Diffusion's VAE and TAESD, with random weights."""
    kl = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=512,
    )  # fmt: skip
    return {"sd": codec(kl), "taesd": codec(AutoencoderTiny())}


@pytest.mark.parametrize(
    ("name", "latent_px", "half", "measured_gib"),
    [("sd", 64, False, 5.6), ("sd", 64, True, 2.85), ("sd", 32, False, 1.39), ("taesd", 64, False, 0.54),
     ("taesd", 64, True, 0.27)],
)  # fmt: skip
def test_activations_of_published_decoders(
    decoders: dict[str, Codec], name: str, latent_px: int, half: bool, measured_gib: float
):
    assert decoder_bytes(decoders[name], latent_px, half) / GIB == pytest.approx(measured_gib, rel=0.02)


def test_what_is_counted_is_what_the_graph_stores():
    """On a small decoder at its full size, where everything can be counted at once."""
    decoder, stored = codec(small_kl()), {}
    frozen = {p.untyped_storage()._cdata for p in decoder.vae.parameters()}

    def count(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage()._cdata not in frozen:
            stored[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        image = decoder.decode(torch.zeros(1, 4, 24, 24, requires_grad=True))
    assert image.shape == (1, 3, 192, 192)
    assert decoder_bytes(decoder, 24, half=False) == pytest.approx(sum(stored.values()), rel=0.02)


def test_activations_of_the_dit():
    full = FinetuneConfig(batch_size=8)
    assert activation_bytes(full, DIT_XL_2_512, 0, "off") == pytest.approx(8 * 0.99 * GIB, rel=0.02)  # measured
    quarter = FinetuneConfig(batch_size=8, accumulate=4)
    assert activation_bytes(quarter, DIT_XL_2_512, 0, "off") * 4 == activation_bytes(full, DIT_XL_2_512, 0, "off")


@pytest.mark.parametrize(
    ("preset", "decoder", "card_gib", "expected"),
    [("paper", "sd", 80, "off"), ("paper", "sd", 24, "on"), ("best", "taesd", 24, "off"), ("best", "taesd", 12, "on"),
     ("released", "sd", 24, "off")],
)  # fmt: skip
def test_presets_fit_their_cards(decoders: dict[str, Codec], preset: str, decoder: str, card_gib: int, expected: str):
    config, free = load_config(preset).finetune, (card_gib - LOADED_GIB) * GIB
    choice = choose_checkpointing(config, DIT_XL_2_512, decoders[decoder], int(free))
    assert choice == expected
    of_image = 0
    if config.lsr_mode != "off":
        of_image = decoder_bytes(decoders[decoder], config.lsr_crop_px or 64, config.precision == "bf16")
    assert activation_bytes(config, DIT_XL_2_512, of_image, choice) < 0.7 * free


def test_the_decoder_is_sliced_before_blocks_are_recomputed(decoders: dict[str, Codec]):
    config = FinetuneConfig(batch_size=2, precision="fp32", lsr_mode="pixels")
    of_image = decoder_bytes(decoders["sd"], 64, half=False)
    for choice in ("off", "decoder"):
        free = activation_bytes(config, DIT_XL_2_512, of_image, choice) / 0.7 + 1
        assert choose_checkpointing(config, DIT_XL_2_512, decoders["sd"], int(free) + 1) == choice
        assert choose_checkpointing(config, DIT_XL_2_512, decoders["sd"], int(free * 0.99)) != choice


def test_a_cpu_recomputes_nothing_unless_told():
    decoder = codec(small_kl())
    assert choose_checkpointing(FinetuneConfig(), DIT_XL_2_512, decoder, None) == "off"
    assert choose_checkpointing(FinetuneConfig(checkpointing="on"), DIT_XL_2_512, decoder, None) == "on"
