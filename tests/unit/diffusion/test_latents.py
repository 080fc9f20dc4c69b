"""The latents stage: posteriors of both flips, in the order of the patches, whatever interrupts it."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ddsr_core.config import Runtime
from ddsr_core.diffusion import latents
from ddsr_core.diffusion.base import load_base
from ddsr_core.diffusion.config import LatentsConfig
from ddsr_core.diffusion.latents import batches_of_patches, open_latents
from ddsr_core.diffusion.training_set import draw_batch, draw_latents, load_training_set
from ddsr_core.errors import InputError
from ddsr_core.imaging.bicubic import psnr_bic
from ddsr_core.imaging.images import to_float, to_signed
from tests.helpers.interruption import Killed, digests, killing_after
from tests.helpers.published_models import SHAPE as KL_SHAPE
from tests.helpers.published_models import small_kl, write_diffusers
from tests.helpers.tiny_base import IMAGE_PX, write_base, write_clusters, write_patches

CONFIG = LatentsConfig(batch_size=8)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("inputs")
    return {"patches": write_patches(home / "patches", count=20), "base": write_base(home / "base")}


@pytest.fixture(scope="module")
def variational(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of 64-px patches under a KL VAE."""
    home = tmp_path_factory.mktemp("variational")
    patches, base = write_patches(home / "patches", count=6, side=64), write_diffusers(home / "base")
    latents.run(CONFIG, patches=patches, base=base, out=home, runtime=Runtime())
    return home


def test_each_patch_and_its_mirror_image_are_encoded_in_order(inputs: dict[str, Path], tmp_path: Path):
    latents.run(CONFIG, **inputs, out=tmp_path, runtime=Runtime())
    found, base = open_latents(tmp_path), load_base(str(inputs["base"]))
    names, images = zip(*batches_of_patches(inputs["patches"], IMAGE_PX), strict=True)
    x = to_float(np.concatenate(images))
    with torch.inference_mode():
        plain, mirrored = base.encode(to_signed(x)), base.encode(to_signed(x.flip(3)))
    assert found.patch_ids == [name for batch in names for name in batch]
    assert found.log_variance is None
    np.testing.assert_allclose(found.mean, torch.stack([plain, mirrored]).numpy(), rtol=1e-3)
    np.testing.assert_allclose(found.psnr_bic, psnr_bic(x).numpy(), rtol=1e-5)


@pytest.mark.parametrize("amount", [8, 16])
def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(inputs: dict[str, Path], tmp_path: Path, amount: int):
    latents.run(CONFIG, **inputs, out=tmp_path / "whole", runtime=Runtime())
    with pytest.raises(Killed):
        latents.run(CONFIG, **inputs, out=tmp_path / "cut", runtime=killing_after("Encoding patches", amount))
    latents.run(CONFIG, **inputs, out=tmp_path / "cut", runtime=Runtime())
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_a_line_cut_in_the_journal_costs_its_batch_only(inputs: dict[str, Path], tmp_path: Path):
    latents.run(CONFIG, **inputs, out=tmp_path / "whole", runtime=Runtime())
    with pytest.raises(Killed):
        latents.run(CONFIG, **inputs, out=tmp_path / "cut", runtime=killing_after("Encoding patches", 16))
    journal = tmp_path / "cut/resume/done.txt"
    journal.write_text(journal.read_text()[:-9])
    latents.run(CONFIG, **inputs, out=tmp_path / "cut", runtime=Runtime())
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_a_kl_vae_leaves_its_whole_posterior(variational: Path):
    found = open_latents(variational)
    assert found.log_variance is not None
    assert found.mean.shape == found.log_variance.shape == (2, 6, 4, KL_SHAPE.latent_px, KL_SHAPE.latent_px)
    _, images = next(batches_of_patches(variational / "patches", 64))
    posterior = small_kl().eval().encode(to_signed(to_float(images))).latent_dist
    np.testing.assert_allclose(found.mean[0], 0.18215 * posterior.mean.detach(), atol=2e-3, rtol=2e-3)
    deviation = np.exp(0.5 * found.log_variance[0].astype(np.float32))
    np.testing.assert_allclose(deviation, 0.18215 * posterior.std.detach(), rtol=5e-3)


def test_every_draw_is_another_sample_of_the_posterior(variational: Path):
    found = open_latents(variational)
    assert found.log_variance is not None
    generator = torch.Generator().manual_seed(0)
    many = torch.stack([draw_latents(found, np.zeros(2, int), np.array([0, 3]), generator) for _ in range(400)])
    wanted = np.exp(0.5 * found.log_variance[0][[0, 3]].astype(np.float32))
    np.testing.assert_allclose(many.std(0).mean(), wanted.mean(), rtol=0.03)
    np.testing.assert_allclose(many.mean(0), found.mean[0][[0, 3]].astype(np.float32), atol=6 * wanted.max() / 20)


def test_a_step_draws_the_same_latents_again(variational: Path, tmp_path: Path):
    data = load_training_set(variational, write_clusters(tmp_path / "clusters", count=6, k=2), {0: 0, 1: 1})
    first, again, other = (
        draw_batch(data, step=step, size=4, null_row=1000, label_dropout=0.1, flip=True, seed=0) for step in (3, 3, 4)
    )
    assert torch.equal(first.x0, again.x0)
    assert torch.equal(first.noise, again.noise)
    assert not torch.equal(first.x0, other.x0)


def test_another_vae_may_encode(inputs: dict[str, Path], tmp_path: Path):
    base = load_base(str(inputs["base"]))
    base.vae.encoder.layers[0].weight.data.mul_(2)
    base.vae.save_pretrained(tmp_path / "vae")
    latents.run(CONFIG, **inputs, out=tmp_path / "own", runtime=Runtime())
    latents.run(CONFIG, **inputs, vae=tmp_path / "vae", out=tmp_path / "other", runtime=Runtime())
    assert not np.array_equal(open_latents(tmp_path / "own").mean, open_latents(tmp_path / "other").mean)


def test_patches_of_another_size_are_refused(inputs: dict[str, Path], tmp_path: Path):
    wrong = write_patches(tmp_path / "patches", side=IMAGE_PX * 2)
    with pytest.raises(InputError, match="patches are 32x32"):
        latents.run(CONFIG, patches=wrong, base=inputs["base"], out=tmp_path, runtime=Runtime())


def test_folders_without_patches_or_latents_are_refused(inputs: dict[str, Path], tmp_path: Path):
    with pytest.raises(InputError, match="no patches"):
        latents.run(CONFIG, patches=tmp_path, base=inputs["base"], out=tmp_path, runtime=Runtime())
    with pytest.raises(InputError, match="no latents"):
        open_latents(tmp_path)


def test_a_full_disk_is_an_error_and_not_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        latents._put(tmp_path / "mean.npy", np.zeros((2, 1, 4, 8, 8), np.float16), 0, 1000)
    assert not (tmp_path / "mean.npy").exists()


def test_an_array_file_has_its_disk_space_from_the_start(tmp_path: Path) -> None:
    values = np.arange(2 * 3 * 4, dtype=np.float16).reshape(2, 3, 4, 1, 1)
    latents._put(tmp_path / "mean.npy", values, 2, 500)
    assert (tmp_path / "mean.npy").stat().st_blocks * 512 >= 2 * 2 * 500 * 4
    array = np.load(tmp_path / "mean.npy")
    assert array.shape == (2, 500, 4, 1, 1)
    np.testing.assert_array_equal(array[:, 2:5], values)
    assert not array[:, 5:].any()
