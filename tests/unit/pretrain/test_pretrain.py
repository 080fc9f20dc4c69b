"""Pretraining from photographs to a base folder that loads and samples; and the list of wallpapers."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from ddsr_core.config import Runtime
from ddsr_core.diffusion.base import TRANSFORMER, load_base
from ddsr_core.diffusion.samplers import sample_latents
from ddsr_core.errors import InputError
from ddsr_core.imaging.images import save_png
from ddsr_core.pretrain.config import PretrainConfig
from ddsr_core.pretrain.photos import scaled_copies, textured_patches
from ddsr_core.pretrain.prior import PriorData, channel_statistics, prior_batch
from ddsr_core.pretrain.run import run
from ddsr_core.pretrain.wallpapers import file_name, listed_photos
from ddsr_core.storage.files import sha256_of

TINY = PretrainConfig(
    short_sides_px=(96,), below_db=60, stride_px=32, vae_channels=8, vae_steps=2, decoder_steps=1, vae_batch=2, classes=2,
    hidden=16, depth=1, heads=2, prior_steps=4, prior_batch=2, prior_warmup=1, checkpoint_every=2,
)  # fmt: skip


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for seed in range(2):
        noise = np.random.default_rng(seed).integers(0, 256, (200, 240, 3), dtype=np.uint8)
        save_png(tmp_path / f"photos/{seed}.png", cv2.GaussianBlur(noise, (0, 0), 2))
    return tmp_path / "photos"


@pytest.mark.slow
def test_photographs_become_a_base_that_samples_and_a_cut_off_run_goes_on(photos: Path, tmp_path: Path):
    run(TINY, photos=photos, out=tmp_path / "base", runtime=Runtime())
    base = load_base(str(tmp_path / "base"))
    rows = torch.tensor([0, base.null_row])
    latents = sample_latents(base.dit, rows, [0, 1], seed=0, sampler="dpmpp", steps=2, guidance_scale=1.0)
    assert base.decode(latents).shape == (2, 3, 64, 64)

    half = TINY.model_copy(update={"prior_steps": 2})
    run(half, photos=photos, out=tmp_path / "half", runtime=Runtime())  # leaves its checkpoint in resume/
    assert (tmp_path / "half/resume/prior.pt").is_file()
    run(TINY, photos=photos, out=tmp_path / "half", runtime=Runtime())
    assert (tmp_path / "half" / TRANSFORMER).is_file()
    assert sha256_of(tmp_path / "half/vae/diffusion_pytorch_model.safetensors") == sha256_of(
        tmp_path / "base/vae/diffusion_pytorch_model.safetensors"
    )


def test_photos_are_reduced_by_at_least_what_is_asked():
    image = np.zeros((100, 150, 3), np.uint8)
    assert [copy.shape[:2] for copy in scaled_copies(image, (80, 50, 25), 2.0)] == [(50, 75), (25, 38)]


def test_only_textured_windows_are_kept(photos: Path):
    patches = textured_patches(
        photos, window_px=64, stride_px=32, below_db=60, short_sides_px=(96,), least_reduction=1.9, most=3, seed=0
    )
    assert patches.shape == (3, 64, 64, 3)
    with pytest.raises(InputError, match="no window of 2 photos"):
        textured_patches(
            photos, window_px=64, stride_px=32, below_db=1, short_sides_px=(96,), least_reduction=1.9, most=3, seed=0
        )


def test_batches_depend_on_the_step_alone_and_drop_labels():
    data = PriorData(torch.randn(2, 10, 4, 4, 4).half(), torch.zeros(10, dtype=torch.long))
    first, again = (prior_batch(data, 64, 7, 0.5, 0, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], prior_batch(data, 64, 7, 0.5, 0, 4)[0])
    assert set(first[1].tolist()) == {0, 7}


def test_statistics_make_unit_latents():
    latents = (torch.randn(2, 50, 4, 8, 8) * 3 + 1).half()
    shift, scale = channel_statistics(latents)
    np.testing.assert_allclose(shift, 1, atol=0.1)
    np.testing.assert_allclose(scale, 1 / 3, atol=0.02)


def test_the_list_of_wallpapers_is_whole():
    rows = listed_photos()
    assert len(rows) == len({file_name(row["path"]) for row in rows}) == 28
    assert all(len(row["sha256"]) == 64 for row in rows)
    assert file_name("/usr/share/wallpapers/Kite/contents/images/2560x1600.jpg") == "Kite.jpg"
