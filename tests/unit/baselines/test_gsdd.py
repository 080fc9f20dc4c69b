"""GSDD, our reading: what is matched, where it begins, and that a run cut off ends with the bytes of a whole one."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ddsr_core.baselines.config import GSDDConfig
from ddsr_core.baselines.gsdd import augment, features, initial_latents, invert, paired_patches, run
from ddsr_core.config import Runtime
from ddsr_core.errors import ConfigError, InputError, TrainingError
from ddsr_core.imaging.bicubic import make_lr, upsample
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.image_sets import read_image_set
from ddsr_core.imaging.images import to_float, to_uint8
from ddsr_core.sr.networks import build_network
from ddsr_core.sr.weights import save_weights
from tests.helpers.interruption import Killed, digests, killing_after
from tests.helpers.tiny_base import write_clusters, write_patches

CONFIG = GSDDConfig(count=7, steps=4, batch_real=4, seed=3)
KWARGS = {"feat": 8, "blocks": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("gsdd")
    torch.manual_seed(0)
    save_weights(home / "generator", build_network("edsr-small", KWARGS), "edsr-small", KWARGS, 4, {})
    return {
        "patches": write_patches(home / "patches", count=25),
        "clusters": write_clusters(home / "clusters", 25, 3),
        "generator": home / "generator",
    }


class Plain(nn.Module):
    """Enlarges by bicubic after a feature map that is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return upsample(x) + 0 * self.trunk(x).mean()


def test_the_set_has_equal_shares_and_says_what_it_is(inputs: dict[str, Path], tmp_path: Path):
    run(CONFIG, **inputs, out=tmp_path, runtime=Runtime())
    rows = read_image_set(tmp_path)
    assert [row["pseudo_label"] for row in rows] == [0, 0, 0, 1, 1, 2, 2]
    assert read_rgb(tmp_path / rows[0]["file_name"]).shape == (16, 16, 3)
    assert len({(tmp_path / row["file_name"]).read_bytes() for row in rows}) == 7
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["psnr_bic_mean"] == pytest.approx(np.mean([row["psnr_bic"] for row in rows]), abs=1e-3)
    curve = [float(row["loss"]) for row in csv.DictReader((tmp_path / "curves.csv").open(newline=""))]
    assert len(curve) == 4
    assert summary["loss_first"] == pytest.approx(curve[0], abs=1e-5)
    assert summary["loss_last"] == pytest.approx(curve[-1], abs=1e-5)


def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(inputs: dict[str, Path], tmp_path: Path):
    run(CONFIG, **inputs, out=tmp_path / "whole", runtime=Runtime())
    with pytest.raises(Killed):
        run(CONFIG, **inputs, out=tmp_path / "cut", runtime=killing_after("GSDD", 4))
    run(CONFIG, **inputs, out=tmp_path / "cut", runtime=Runtime())
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_the_mean_of_a_class_is_met():
    """Real patches are dark or bright, half of them each: a single image that begins at one of them ends in between."""
    torch.manual_seed(0)
    real = np.repeat(np.array([40, 240], np.uint8), 8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)
    config = GSDDConfig(steps=150, learning_rate=0.02, batch_real=16, regularizer=0.0)
    network = Plain().requires_grad_(False)
    begin = float(initial_latents(config, real, 1, 0).mean()) * 255
    made, losses = invert(config, network, real, 1, 0, "cpu")
    assert min(abs(begin - 40), abs(begin - 240)) < 2
    assert abs(float(made.mean()) - 140) < 40
    assert losses[-20:].mean() < 0.5 * losses[:5].mean()


def test_the_regularizer_keeps_latents_near_their_initial_values():
    torch.manual_seed(0)
    real = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    network = Plain().requires_grad_(False)
    moved = {}
    for weight in (0.0, 1e6):
        config = GSDDConfig(steps=20, batch_real=4, regularizer=weight)
        made, _ = invert(config, network, real, 2, 0, "cpu")
        first = to_uint8(network(initial_latents(config, real, 2, 0)))
        moved[weight] = np.abs(made.astype(float) - first).mean()
    assert moved[1e6] < 0.5 * moved[0.0]


def test_latents_begin_at_the_lr_of_different_patches_of_the_class():
    real = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    begin = initial_latents(GSDDConfig(), real, 4, 0)
    every = make_lr(to_float(real))
    found = [int((every - z).abs().amax((1, 2, 3)).argmin()) for z in begin]
    assert len(set(found)) == 4
    assert all(torch.equal(every[index], z) for index, z in zip(found, begin, strict=True))


def test_a_start_from_noise_is_no_patch_and_has_the_statistics_of_the_class():
    real = np.random.default_rng(0).integers(100, 140, (12, 32, 32, 3), dtype=np.uint8)
    real[..., 0] //= 2  # red is darker
    begin = initial_latents(GSDDConfig(init="noise"), real, 5, 0)
    lr = make_lr(to_float(real))
    assert begin.shape == (5, 3, 8, 8)
    assert torch.allclose(begin.mean((0, 2, 3)), lr.mean((0, 2, 3)), atol=0.01)
    assert torch.allclose(begin.std((0, 2, 3)), lr.std((0, 2, 3)), rtol=0.2)
    assert min(float((lr - z).abs().amax((1, 2, 3)).min()) for z in begin) > 0.02
    assert not torch.equal(begin[0], begin[1])


def test_pairs_keep_the_images_of_a_class_apart_where_the_mean_alone_lets_them_fall_together():
    """Real patches are dark or bright. Images that start alike meet the mean; only with pairs do they become different."""
    torch.manual_seed(0)
    real = np.repeat(np.array([40, 240], np.uint8), 8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)
    network, spread = Plain().requires_grad_(False), {}
    for form in ("initial", "pairs"):
        config = GSDDConfig(steps=150, learning_rate=0.02, init="noise", regularizer=1.0, regularizer_form=form)
        partners = real[paired_patches(config, len(real), 6, 0)].mean((1, 2, 3))
        made, _ = invert(config, network, real, 6, 0, "cpu")
        spread[form] = float(made.mean((1, 2, 3)).std()) / float(partners.std())
    assert spread["pairs"] > 0.4
    assert spread["initial"] < 0.5 * spread["pairs"]


def test_the_augmentation_is_one_for_the_whole_batch():
    image = torch.arange(64.0).view(1, 1, 8, 8).expand(2, 3, 8, 8)
    crop = augment(image, np.array([0.0, 0.999]), 0)
    assert torch.equal(crop, image[..., :4, 4:])
    assert torch.equal(augment(image, np.array([0.0, 0.0]), 4), image[..., :4, :4].flip(3))
    assert torch.equal(augment(image, np.array([0.0, 0.0]), 1), torch.rot90(image[..., :4, :4], 1, (2, 3)))


@pytest.mark.parametrize(
    ("arch", "kwargs"),
    [
        ("edsr-small", KWARGS),
        ("rcan-small", {"feat": 8, "groups": 1, "blocks": 1, "reduction": 2}),
        ("rrdbnet-small", {"feat": 8, "blocks": 1, "grow": 4}),
        ("srformer-small", {"embed": 8, "depths": [1], "heads": [2]}),
    ],
)
def test_every_kind_of_network_has_features(arch: str, kwargs: dict[str, object]):
    batch = torch.rand(2, 3, 16, 16, requires_grad=True)
    found = features(build_network(arch, kwargs).eval(), batch)
    assert found.ndim == 2
    assert found.shape[0] == 2
    found.sum().backward()
    assert batch.grad is not None
    assert batch.grad.abs().sum() > 0


def test_what_cannot_be_used_is_one_message(inputs: dict[str, Path], tmp_path: Path):
    other = write_clusters(tmp_path / "clusters", 24, 3)
    with pytest.raises(InputError, match="do not belong together"):
        run(CONFIG, **{**inputs, "clusters": other}, out=tmp_path / "a", runtime=Runtime())
    with pytest.raises(TrainingError, match=r"loss of class 0 is (nan|inf)"):
        invert(CONFIG, Broken(), np.zeros((4, 16, 16, 3), np.uint8), 2, 0, "cpu")
    with pytest.raises(ConfigError, match="no feature map"):
        features(nn.Identity(), torch.rand(1, 3, 8, 8))


class Broken(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.trunk(x * float("nan"))
        return upsample(x)
