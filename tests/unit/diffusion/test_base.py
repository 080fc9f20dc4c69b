"""Base models in the three layouts they come in."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from ddsr_core.diffusion.base import DIT_LICENSE, base_source, load_base, vae_source
from ddsr_core.diffusion.codec import load_codec
from ddsr_core.diffusion.dit import DIT_XL_2_512, DiTConfig
from ddsr_core.errors import InputError, MissingWeightsError
from tests.helpers.published_models import SHAPE, diffusers_dit, small_kl, small_taesd, write_diffusers, write_original
from tests.helpers.tiny_base import tiny_dit, write_base


@pytest.fixture
def probe() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([0, 400, 999]), torch.tensor([3, 700, 1000])


@pytest.fixture
def kl(tmp_path: Path) -> Path:
    small_kl().save_pretrained(tmp_path / "kl")
    return tmp_path / "kl"


def same_parameters(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("safe", [True, False])
def test_diffusers_layout_is_read_to_the_last_bit(tmp_path: Path, safe: bool) -> None:
    base = load_base(str(write_diffusers(tmp_path / "base", safe=safe)))
    assert base.dit.config == SHAPE
    assert same_parameters(base.dit, tiny_dit(shape=SHAPE))
    assert (base.image_px, base.null_row, base.class_names[7]) == (64, 1000, "thing 7, stuff")
    assert base.codec.scale == (0.18215,) * 4


def test_original_file_is_read_to_the_last_bit(tmp_path: Path, kl: Path) -> None:
    base = load_base(str(write_original(tmp_path / "DiT-512x512.pt")), vae=kl)
    assert base.dit.config == SHAPE
    assert same_parameters(base.dit, tiny_dit(shape=SHAPE))


def test_all_layouts_of_one_model_have_one_digest(tmp_path: Path, kl: Path) -> None:
    diffusers = load_base(str(write_diffusers(tmp_path / "base")))
    original = load_base(str(write_original(tmp_path / "x.pt")), vae=kl)
    other = load_base(str(write_original(tmp_path / "y.pt", tiny_dit(seed=1, shape=SHAPE))), vae=kl)
    assert diffusers.digest == original.digest != other.digest


def test_output_is_that_of_diffusers_module_once_its_deviations_are_corrected(tmp_path: Path, probe) -> None:  # type: ignore[no-untyped-def]
    base = load_base(str(write_diffusers(tmp_path / "base")))
    x, t, y = probe
    with torch.no_grad():
        expected = diffusers_dit(tiny_dit(shape=SHAPE))(x, t, y).sample
        found = base.dit(x, t, y)
    assert torch.allclose(found, expected, atol=2e-5 * float(expected.abs().max()))


def test_published_widths_need_no_sidecar(tmp_path: Path, kl: Path) -> None:
    shape = DiTConfig(latent_px=8, hidden=384, depth=1, heads=6, classes=3)  # the width of DiT-S
    path = write_original(tmp_path / "DiT-S.pt", tiny_dit(shape=shape))
    path.with_suffix(".json").unlink()
    base = load_base(str(path), vae=kl)
    assert base.dit.config == shape
    assert base.info.license == DIT_LICENSE


def test_unknown_width_asks_for_the_heads(tmp_path: Path, kl: Path) -> None:
    path = write_original(tmp_path / "odd.pt")
    path.with_suffix(".json").unlink()
    with pytest.raises(InputError, match=r"heads.*\n.*\n.*odd.json"):
        load_base(str(path), vae=kl)


def test_training_checkpoint_of_the_original_code_gives_its_average(tmp_path: Path, kl: Path) -> None:
    path = write_original(tmp_path / "ckpt.pt")
    average, raw = tiny_dit(seed=5, shape=SHAPE).state_dict(), tiny_dit(shape=SHAPE).state_dict()
    torch.save({"model": raw, "ema": average, "opt": {}}, path)
    assert torch.equal(load_base(str(path), vae=kl).dit.pos_embed, average["pos_embed"])
    assert torch.equal(
        load_base(str(path), vae=kl).dit.state_dict()["x_embedder.proj.weight"], average["x_embedder.proj.weight"]
    )


def test_original_file_without_a_vae_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match="sd-vae-ft-mse"):
        load_base(str(write_original(tmp_path / "x.pt")))


def test_pickled_objects_are_refused(tmp_path: Path, kl: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (pytest.fail, ("unpickled",))

    path = tmp_path / "trap.pt"
    torch.save({"x": Trap()}, path)
    with pytest.raises(InputError, match="cannot be read"):
        load_base(str(path), vae=kl)
    path.write_bytes(pickle.dumps({"x": Trap()}))
    with pytest.raises(InputError, match="cannot be read"):
        load_base(str(path), vae=kl)


@pytest.mark.parametrize(
    "victim", ["transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"]
)
def test_damaged_file_is_named(tmp_path: Path, victim: str) -> None:
    folder = write_diffusers(tmp_path / "base")
    (folder / victim).write_bytes((folder / victim).read_bytes()[:100])
    with pytest.raises(InputError, match=victim.split("/")[0]):
        load_base(str(folder))


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = write_diffusers(tmp_path / "base")
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(MissingWeightsError, match=r"vae/diffusion_pytorch_model\.safetensors"):
        base_source(str(folder))


def test_hub_without_network_names_every_file_and_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeightsError) as caught:
        base_source("facebook/DiT-XL-2-512")
    for part in (
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.bin",
        "vae/config.json",
        "base=/that/folder",
    ):
        assert part in str(caught.value)
    with pytest.raises(MissingWeightsError, match="vae=/that/folder"):
        vae_source("stabilityai/sd-vae-ft-mse")


def test_hub_cache_is_used_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--some--dit/snapshots/0123456789012345678901234567890123456789"
    write_diffusers(snapshot, safe=False)
    (tmp_path / "models--some--dit/refs").mkdir()
    (tmp_path / "models--some--dit/refs/main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load_base(str(base_source("some/dit").path)).dit.config == SHAPE


def test_a_folder_of_nothing_and_a_wrong_name(tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match=r"transformer/config\.json"):
        base_source(str(tmp_path))
    with pytest.raises(MissingWeightsError, match="there is no"):
        base_source("no such base")


def test_own_layout_takes_another_vae(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    small_taesd().save_pretrained(tmp_path / "taesd")
    assert load_base(str(folder), vae=tmp_path / "taesd").codec.scale == (1.0,) * 4


def test_posterior_is_in_diffusion_units(kl: Path) -> None:
    codec = load_codec(kl)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, log_variance = codec.moments(images)
    posterior = AutoencoderKL.from_pretrained(kl).encode(images).latent_dist
    assert log_variance is not None
    assert torch.allclose(mean, posterior.mean * 0.18215)
    assert torch.allclose((0.5 * log_variance).exp(), posterior.std * 0.18215, rtol=1e-5)
    assert torch.allclose(codec.decode(mean), AutoencoderKL.from_pretrained(kl).decode(posterior.mean).sample, atol=1e-5)


def test_taesd_takes_diffusion_latents_as_they_are(tmp_path: Path) -> None:
    vae = small_taesd().eval()
    vae.save_pretrained(tmp_path / "taesd")
    codec = load_codec(tmp_path / "taesd")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(codec.decode(latents), vae.decode(latents).sample, atol=1e-6)
    assert codec.moments(codec.decode(latents))[1] is None
    assert codec.pixels_per_latent() == 8


def test_published_configs_may_name_the_older_class(tmp_path: Path) -> None:
    folder = write_diffusers(tmp_path / "base", safe=False)
    config = json.loads((folder / "transformer/config.json").read_text())
    (folder / "transformer/config.json").write_text(json.dumps({**config, "_class_name": "Transformer2DModel"}))
    assert same_parameters(load_base(str(folder)).dit, tiny_dit(shape=SHAPE))
    (folder / "transformer/config.json").write_text(
        json.dumps({**config, "_class_name": "Transformer2DModel", "norm_type": "layer_norm"})
    )
    with pytest.raises(InputError, match="not a DiT"):
        load_base(str(folder))


def test_wrong_kind_of_model_is_refused(tmp_path: Path) -> None:
    folder = write_diffusers(tmp_path / "base")
    config = json.loads((folder / "transformer/config.json").read_text())
    (folder / "transformer/config.json").write_text(json.dumps({**config, "_class_name": "PixArtTransformer2DModel"}))
    with pytest.raises(InputError, match="not a DiT"):
        load_base(str(folder))


def test_full_shape_is_that_of_the_paper() -> None:
    assert (DIT_XL_2_512.hidden, DIT_XL_2_512.depth, DIT_XL_2_512.heads, DIT_XL_2_512.latent_px) == (1152, 28, 16, 64)
