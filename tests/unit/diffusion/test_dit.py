"""The DiT against diffusers' module, with its two deviations from the original set right."""

import pytest
import torch
from diffusers import DiTTransformer2DModel

from ddsr_core.diffusion.dit import DIT_XL_2_512, DiT, DiTConfig
from ddsr_core.diffusion.layouts import to_diffusers

SMALL = DiTConfig(latent_px=8, hidden=48, depth=2, heads=4, classes=5)


def random_dit(config: DiTConfig = SMALL) -> DiT:
    torch.manual_seed(0)
    model = DiT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model


def diffusers_twin(model: DiT) -> DiTTransformer2DModel:
    config = model.config
    twin = DiTTransformer2DModel(
        num_attention_heads=config.heads, attention_head_dim=config.hidden // config.heads, in_channels=4, out_channels=8,
        num_layers=config.depth, sample_size=config.latent_px, patch_size=2, num_embeds_ada_norm=config.classes,
    ).eval()  # fmt: skip
    twin.load_state_dict(to_diffusers(model.state_dict(), config.depth))
    for block in twin.transformer_blocks:  # diffusers divides the exponent by 127 and uses eps 1e-5
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    return twin


def test_equals_diffusers_once_its_two_deviations_are_set_right():
    model = random_dit()
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 5])
    with torch.no_grad():
        ours = model(x, t, y)
        theirs = diffusers_twin(model)(x, timestep=t, class_labels=y).sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_size_of_the_papers_model():
    with torch.device("meta"):
        model = DiT(DIT_XL_2_512)
    assert sum(p.numel() for p in model.parameters()) == 676_111_136 - 96_768


def test_gammas_of_one_change_nothing_and_sit_in_the_first_blocks_only():
    model = random_dit()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 800]), torch.tensor([1, 2])
    with torch.no_grad():
        before = model(x, t, y)
        model.enable_gammas(1)
        torch.testing.assert_close(model(x, t, y), before, rtol=0, atol=0)
    names = [name for name, _ in model.named_parameters() if "gamma" in name]
    assert names
    assert all(name.startswith("blocks.0.") for name in names)


def test_block_checkpointing_gives_the_same_gradient():
    model = random_dit()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 800]), torch.tensor([1, 2])

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(x, t, y).square().mean().backward()
        return model.blocks[0].mlp.fc1.weight.grad.clone()

    plain = gradient()
    model.checkpoint_blocks = True
    torch.testing.assert_close(gradient(), plain)


def test_samples_are_conditioned_on_their_own_label():
    model = random_dit()
    x, t = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1), torch.tensor([10, 10])
    with torch.no_grad():
        a, b = model(x, t, torch.tensor([0, SMALL.null_row]))
    assert (a - b).abs().max() > 1e-3


def test_label_outside_the_table_is_refused():
    with pytest.raises(IndexError):
        random_dit()(torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.tensor([6]))
