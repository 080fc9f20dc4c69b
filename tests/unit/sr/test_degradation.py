"""Real-ESRGAN's degradation: whole images, repeatable, of the ranges that are published."""

import random

import numpy as np
import pytest
import skimage
import torch

from ddsr_core.config import Runtime
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.evaluation.evaluator import Bicubic, Evaluator
from ddsr_core.imaging.bicubic import make_lr
from ddsr_core.imaging.images import save_png, to_float
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.degradation import RealEsrganDegradation, seed_of, smallest_px
from ddsr_core.sr.train_sr import run

PHOTO = np.ascontiguousarray(skimage.data.astronaut()[100:196, 100:220])


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_lr_images_are_whole_and_depend_on_the_seed_alone(scale):
    degrade = RealEsrganDegradation(scale, "cpu")
    hr = to_float(PHOTO)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first, again, other = degrade(hr, (1, 2)), degrade(hr, (1, 2)), degrade(hr, (1, 3))
    assert first.shape == (1, 3, 96 // scale, 120 // scale)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first, (first * 255).round() / 255)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_lr_images_show_the_photo_worse_than_bicubic():
    """The mean over seeds is near the bicubic LR image; single ones are not."""
    degrade, hr = RealEsrganDegradation(4, "cpu"), to_float(PHOTO)
    made = torch.cat([degrade(hr, (seed,)) for seed in range(40)])
    bicubic = make_lr(hr)
    error = (made - bicubic).square().mean((1, 2, 3)).sqrt()
    assert error.min() > 0.01
    assert (made.mean(0) - bicubic[0]).square().mean().sqrt() < 0.8 * error.mean()
    assert error.std() > 0.005


def test_images_of_a_batch_have_blurs_of_their_own():
    degrade, hr = RealEsrganDegradation(4, "cpu"), to_float(PHOTO[:96, :96]).expand(2, -1, -1, -1)
    one, other = degrade(hr, (4,))
    assert not torch.equal(one, other)


def test_the_smallest_image_passes_and_a_smaller_one_is_refused():
    degrade, px = RealEsrganDegradation(4, "cpu"), smallest_px(4) + 2
    for seed in range(60):
        assert degrade(to_float(PHOTO[:px, :px]), (seed,)).isfinite().all()
    with pytest.raises(InputError, match="too small for the degradation"):
        degrade(to_float(PHOTO[:72, :72]), (1,))


def test_training_uses_it(tmp_path):
    save_png(tmp_path / "data/a.png", PHOTO)
    values = {"arch": "edsr-small", "arch_kwargs": {"feat": 8, "blocks": 1}, "iterations": 2, "batch_size": 1}
    digests = []
    for number, degradation in enumerate(("bicubic", "real-esrgan", "real-esrgan")):
        config = TrainSRConfig.model_validate({**values, "degradation": degradation, "lr_patch_px": 20})
        run(config, data=tmp_path / "data", out=tmp_path / str(number), runtime=Runtime())
        digests.append((tmp_path / str(number) / "weights.safetensors").read_bytes())
    assert digests[0] != digests[1] == digests[2]
    config = TrainSRConfig.model_validate({**values, "degradation": "real-esrgan", "lr_patch_px": 18})
    with pytest.raises(ConfigError, match="too small for the degradation") as caught:
        run(config, data=tmp_path / "data", out=tmp_path / "small", runtime=Runtime())
    assert "19 or more" in str(caught.value)


def test_evaluation_degrades_an_image_the_same_for_every_network():
    config = EvaluateConfig(degradation="real-esrgan", metrics=("psnr_y",))
    first, second = (Evaluator(Bicubic(4), config, "cpu").enlarge("a", PHOTO) for _ in range(2))
    assert torch.equal(first.lr, second.lr)
    assert torch.equal(first.lr, RealEsrganDegradation(4, "cpu")(to_float(PHOTO), seed_of(PHOTO)))
    assert not torch.equal(first.lr, make_lr(to_float(PHOTO)))
    with pytest.raises(InputError, match="too small"):
        Evaluator(Bicubic(4), config, "cpu").cut("a", PHOTO[:64, :64])
