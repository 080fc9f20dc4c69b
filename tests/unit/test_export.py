"""Export: folded weights in the original layout, and a folder that diffusers' DiTPipeline samples from."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline
from published_models import SHAPE, small_kl, write_diffusers
from safetensors import safe_open
from tiny_base import tiny_dit

from ddsr_core.diffusion.base import TINY, Base, load_base
from ddsr_core.diffusion.codec import Codec
from ddsr_core.diffusion.difffit import fold, unfreeze
from ddsr_core.diffusion.dit import DiTConfig
from ddsr_core.diffusion.export import export, pipeline_transformer, pipeline_vae
from ddsr_core.errors import InputError

LABELS = {0: 0, 1: 4}


def tuned(folder: Path) -> tuple[Base, Base]:
    """A base with DiffFit's parameters shaken, and the same with the scales folded in."""
    pair = []
    for _ in range(2):
        model = load_base(str(folder))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in unfreeze(model.dit, 2).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        pair.append(model)
    fold(pair[1].dit)
    return pair[0], pair[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Base]:
    return tuned(write_diffusers(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def folder(models: tuple[Base, Base], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(models[1], LABELS, tmp_path_factory.mktemp("out") / "pipeline", "diffusers")


def probe(count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 4, 8, 8, generator=generator), torch.tensor([0, 400, 999]), torch.tensor([0, 4, 1000])


def test_the_original_layout_computes_what_was_fine_tuned(models: tuple[Base, Base], tmp_path: Path) -> None:
    small_kl().save_pretrained(tmp_path / "vae")
    export(models[1], LABELS, tmp_path / "out", "original")
    again = load_base(str(tmp_path / "out/dit.safetensors"), vae=tmp_path / "vae")
    with torch.no_grad():
        expected, found = models[0].dit(*probe()), again.dit(*probe())
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    with safe_open(tmp_path / "out/dit.safetensors", "pt") as file:
        assert json.loads(file.metadata()["label_map"]) == {"0": 0, "1": 4}
        assert not any("gamma" in name for name in list(file.keys()))


def test_the_pipeline_samples_pseudo_labels(folder: Path) -> None:
    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.get_label_ids(["pseudo-label 1"]) == [4]
    drawn = [
        pipeline(
            [0, 4], guidance_scale=2.0, num_inference_steps=3, output_type="np", generator=torch.manual_seed(seed)
        ).images
        for seed in (0, 0, 1)
    ]
    assert drawn[0].shape == (2, 64, 64, 3)
    assert (drawn[0] == drawn[1]).all()
    assert abs(drawn[0] - drawn[2]).max() > 0.01


def test_the_pipelines_network_is_ours_once_its_frequencies_are_mended(models: tuple[Base, Base], folder: Path) -> None:
    transformer = DiTPipeline.from_pretrained(folder).transformer
    x, t, y = probe()
    with torch.no_grad():
        expected = models[0].dit(x, t, y)
        before = transformer(x, t, y).sample
        for block in transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        found = transformer(x, t, y).sample
    assert torch.allclose(found, expected, atol=2e-5 * float(expected.abs().max()))
    assert (before - expected).abs().max() > (found - expected).abs().max() * 100


def test_a_small_table_is_filled_up_to_the_pipelines_null_row() -> None:
    shape = DiTConfig(latent_px=8, hidden=32, depth=2, heads=4, classes=12)
    ours = tiny_dit(shape=shape)
    theirs = pipeline_transformer(ours)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, _ = probe()
    with torch.no_grad():
        expected, found = ours(x, t, torch.tensor([0, 11, 12])), theirs(x, t, torch.tensor([0, 11, 1000])).sample
    assert torch.allclose(found, expected, atol=2e-5 * float(expected.abs().max()))


def test_more_classes_than_the_pipeline_knows_are_refused() -> None:
    with pytest.raises(InputError, match="format original"):
        pipeline_transformer(tiny_dit(shape=SHAPE.model_copy(update={"classes": 1001})))


def test_a_kl_vae_keeps_its_weights_and_gets_its_scale() -> None:
    vae = small_kl().eval()
    exported = pipeline_vae(Codec(vae, (0.0,) * 4, (0.3,) * 4))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = Codec(vae, (0.0,) * 4, (0.3,) * 4).decode(latents)
        assert torch.allclose(exported.decode(latents / exported.config.scaling_factor).sample, expected, atol=1e-5)
    assert vae.config.scaling_factor == 0.18215
    with pytest.raises(InputError, match="channel by channel"):
        pipeline_vae(Codec(vae, (0.1, 0.0, 0.0, 0.0), (0.3,) * 4))


def test_ddsr_tinys_channel_scales_go_into_its_convolutions() -> None:
    base = load_base(TINY)
    exported = pipeline_vae(base.codec)
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(image, 5, 1, 2)
    with torch.no_grad():
        latents = base.encode(smooth * 2 - 1)
        assert torch.allclose(exported.encoder(smooth * 2 - 1), latents, atol=1e-4)
        error = (exported.decode(latents).sample - base.decode(latents)).square().mean()
    assert 10 * torch.log10(4 / error) > 45  # dB: the first order is good enough


def test_what_is_there_is_not_overwritten_and_a_failed_export_leaves_nothing(
    models: tuple[Base, Base], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    with pytest.raises(InputError, match="something already"):
        export(models[1], LABELS, tmp_path / "full", "original")
    assert (tmp_path / "full/mine.txt").read_text() == "mine"
    with pytest.raises(InputError, match="fold them first"):
        export(models[0], LABELS, tmp_path / "new", "diffusers")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    (tmp_path / "empty").mkdir()
    assert export(models[1], LABELS, tmp_path / "empty", "original").is_dir()


def test_the_readme_says_what_it_is_and_under_which_licence(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert "1 -> 4" in text
    assert "Licence" in text
