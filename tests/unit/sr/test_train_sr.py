"""The training loop: it learns, it resumes to the same bytes, it stops at what is not finite."""

import hashlib
import math
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from torch import nn

from ddsr_core.config import Runtime
from ddsr_core.errors import ConfigError, InputError, TrainingError
from ddsr_core.imaging.bicubic import make_lr, upsample
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.images import save_png, to_float, to_uint8
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.optim import ema_decay_at, update_ema
from ddsr_core.sr.plan import plan_of
from ddsr_core.sr.state import load_checkpoint, new_state
from ddsr_core.sr.train_sr import run
from ddsr_core.sr.weights import load_network

TINY = TrainSRConfig(
    arch="edsr-small", arch_kwargs={"feat": 8, "blocks": 1}, iterations=12, batch_size=2, lr_patch_px=8,
    learning_rate=1e-3, checkpoint_every=4, seed=3,
)  # fmt: skip
TINY_SRFORMER = TINY.model_copy(update={"arch": "srformer-small", "arch_kwargs": {"embed": 8, "depths": [2], "heads": [2]}})


class Enlarge(nn.Module):
    """A network of a user's own, with dropout; its outputs can be made to go wrong at some step."""

    def __init__(self, scale: int = 4, fails_at: int = -1) -> None:
        super().__init__()
        self.conv, self.dropout = nn.Conv2d(3, 3, 3, padding=1), nn.Dropout(0.5)
        self.scale, self.fails_at, self.calls = scale, fails_at, 0

    def forward(self, x):
        self.calls += self.training
        x = torch.nn.functional.interpolate(self.dropout(self.conv(x)), scale_factor=self.scale)
        return x * math.nan if self.training and self.calls == self.fails_at else x


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    for index in range(3):
        save_png(tmp_path / f"data/{index}.png", generator.integers(0, 256, (32, 40, 3), np.uint8))
    return tmp_path / "data"


def digests(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file() and "resume" not in p.parts]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def killed_at(step: int) -> Runtime:
    """A runtime whose progress bar ends the run once ``step`` steps of this run are done."""

    class Bar:
        done = 0

        def advance(self, amount=1):
            self.done += amount
            if self.done == step:
                raise KeyboardInterrupt

        def note(self, text):
            pass

    @contextmanager
    def progress(title, *, total, unit="items", done=0):
        bar = Bar()
        bar.done = done if title.startswith("Training") else -(10**9)
        yield bar

    return Runtime(progress=progress)


def test_outputs(data, tmp_path):
    result = run(TINY, data=data, out=tmp_path / "out", runtime=Runtime())
    assert set(digests(tmp_path / "out")) == {
        "weights.safetensors", "weights.pth", "model.json", "curves.csv", "summary.json",
        *(f"grids/step-{step:06d}.png" for step in range(1, 13)),
    }  # fmt: skip
    assert (result.counts["images"], result.counts["hr_pixels"]) == (3, 3 * 32 * 40)
    rows = (tmp_path / "out/curves.csv").read_text().splitlines()
    assert rows[0] == "step,loss,learning_rate"
    assert [int(row.split(",")[0]) for row in rows[1:]] == list(range(1, 13))
    assert load_network(tmp_path / "out").name == "edsr-small"


@pytest.mark.parametrize(
    "config", [TINY, TINY_SRFORMER, TINY.model_copy(update={"arch": f"{__name__}:Enlarge", "arch_kwargs": {}})],
    ids=["edsr", "srformer", "own-with-dropout"],
)  # fmt: skip
def test_killed_and_resumed_equals_never_killed(config, data, tmp_path):
    run(config, data=data, out=tmp_path / "whole", runtime=Runtime())
    for step in (2, 4, 7, 12):  # before the first checkpoint, on one, between two, after the last step
        with pytest.raises(KeyboardInterrupt):
            run(config, data=data, out=tmp_path / "cut", runtime=killed_at(step))
    run(config, data=data, out=tmp_path / "cut", runtime=Runtime())
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_the_callers_random_state_is_left_alone(data, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(TINY, data=data, out=tmp_path / "out", runtime=Runtime())
    assert torch.equal(torch.rand(3), expected)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(data, tmp_path):
    config = TINY.model_copy(update={"arch": f"{__name__}:Enlarge", "arch_kwargs": {"fails_at": 7}})
    with pytest.raises(TrainingError, match="L1 loss is nan at step 7") as caught:
        run(config, data=data, out=tmp_path / "out", runtime=Runtime())
    checkpoint = tmp_path / "out/resume/checkpoint.pt"
    assert str(checkpoint) in caught.value.where
    state = new_state(config, "cpu")
    load_checkpoint(checkpoint, state, config)
    assert state.step == 4
    assert all(p.isfinite().all() for p in state.network.parameters())
    assert not (tmp_path / "out/weights.safetensors").exists()


def test_a_checkpoint_of_another_config_is_refused(data, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(TINY, data=data, out=tmp_path / "out", runtime=killed_at(5))
    with pytest.raises(InputError, match="another config"):
        run(TINY.model_copy(update={"seed": 4}), data=data, out=tmp_path / "out", runtime=Runtime())
    (tmp_path / "out/resume/checkpoint.pt").write_bytes(b"half")
    with pytest.raises(InputError, match="cannot read"):
        run(TINY, data=data, out=tmp_path / "out", runtime=Runtime())


def test_a_network_of_another_scale_is_refused(data, tmp_path):
    config = TINY.model_copy(update={"arch": f"{__name__}:Enlarge", "arch_kwargs": {"scale": 2}})
    with pytest.raises(ConfigError, match="1x3x16x16, not 1x3x32x32"):
        run(config, data=data, out=tmp_path / "out", runtime=Runtime())


def test_schedules_by_hand():
    config = TINY.model_copy(update={"iterations": 100, "learning_rate": 1.0})
    assert [plan_of(config).learning_rate_at(step) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0], abs=1e-12)
    config = config.model_copy(update={"schedule": "step"})
    rates = [plan_of(config).learning_rate_at(step) for step in (0, 49, 50, 80, 90, 95)]
    assert rates == [1, 1, 0.5, 0.25, 0.125, 0.0625]


@pytest.mark.parametrize(
    ("arch", "batch", "patch", "rates"),
    [  # 300 iterations; the published steps at the same shares of the whole
        ("edsr", 16, 48, {0: 1e-4, 199: 1e-4, 200: 5e-5}),
        ("rcan", 16, 48, {0: 1e-4, 60: 5e-5, 120: 2.5e-5, 180: 1.25e-5, 240: 6.25e-6}),
        ("srformer-light", 64, 64, {0: 2e-4, 150: 1e-4, 240: 5e-5, 270: 2.5e-5, 285: 1.25e-5}),
        ("hit-srf", 64, 64, {149: 5e-4, 150: 2.5e-4}),
    ],
)
def test_published_recipes_shrink_to_the_budget(arch, batch, patch, rates):
    plan = plan_of(TrainSRConfig(arch=arch, iterations=300))
    assert (plan.batch_size, plan.lr_patch_px) == (batch, patch)
    assert {step: plan.learning_rate_at(step) for step in rates} == pytest.approx(rates)
    own = plan_of(
        TrainSRConfig(arch=arch, iterations=300, batch_size=3, lr_patch_px=12, learning_rate=0.5, schedule="cosine")
    )
    assert (own.batch_size, own.lr_patch_px, own.learning_rate_at(150)) == (3, 12, pytest.approx(0.25))


def test_average_by_hand():
    assert [ema_decay_at(0.999, step) for step in (0, 90, 10**6)] == [0.1, 0.91, 0.999]
    old, new = nn.BatchNorm2d(1), nn.BatchNorm2d(1)
    new.weight.data.fill_(2)
    new.running_mean.fill_(7)
    update_ema(old, new, 0.75)
    assert (old.weight.item(), old.running_mean.item()) == (1.25, 7)


def test_the_grid_shows_fixed_crops_bicubic_sr_and_hr(data, tmp_path):
    run(TINY, data=data, out=tmp_path / "out", runtime=Runtime())
    first, last = (read_rgb(tmp_path / f"out/grids/step-{step:06d}.png") for step in (1, 12))
    assert first.shape == (4 * 34 - 2, 3 * 34 - 2, 3)  # four crops of 32 px, two pixels between
    columns = [slice(34 * column, 34 * column + 32) for column in range(3)]
    assert np.array_equal(first[:, columns[0]], last[:, columns[0]])
    assert not np.array_equal(first[:, columns[1]], last[:, columns[1]])
    images = [read_rgb(path)[:32] for path in sorted(data.iterdir())]
    for row in range(4):
        crop = first[34 * row : 34 * row + 32, columns[2]]
        assert any(np.array_equal(crop, image[:, x : x + 32]) for image in images for x in (0, 4, 8))
        bicubic = to_uint8(upsample(make_lr(to_float(crop))))[0]  # alike inside: the LR was made of the whole image
        assert np.array_equal(first[34 * row : 34 * row + 32, columns[0]][14:-14, 14:-14], bicubic[14:-14, 14:-14])


def test_compiled_or_not_the_weights_have_the_same_names(data, tmp_path):
    config = TINY.model_copy(update={"compile": True})
    assert list(new_state(config, "cpu").network.state_dict()) == list(new_state(TINY, "cpu").network.state_dict())


def psnr_y(sr: torch.Tensor, hr: torch.Tensor) -> float:
    weights = torch.tensor([65.481, 128.553, 24.966]) / 255
    error = (sr.clamp(0, 1).mul(255).round() - hr * 255)[..., 4:-4, 4:-4]
    return float(20 * math.log10(255) - 10 * torch.einsum("bchw,c->bhw", error, weights).square().mean().log10())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "kwargs", "rate", "steps"),
    [
        ("edsr-small", {"feat": 16, "blocks": 4}, 4e-3, 300),
        ("srformer-small", {}, 3e-3, 500),
    ],
)
def test_learns_to_beat_bicubic_on_a_photo_it_has_not_seen(arch, kwargs, rate, steps, tmp_path):
    photos = Path(skimage.__file__).parent / "data"
    (tmp_path / "data").mkdir()
    for name in ("coffee.png", "astronaut.png", "rocket.jpg"):
        save_png(tmp_path / "data" / f"{name}.png", read_rgb(photos / name))
    config = TrainSRConfig(arch=arch, arch_kwargs=kwargs, iterations=steps, batch_size=8, lr_patch_px=16, learning_rate=rate)
    run(config, data=tmp_path / "data", out=tmp_path / "out", runtime=Runtime())
    hr = to_float(read_rgb(photos / "chelsea.png")[:296, :448])
    lr = make_lr(hr)
    with torch.no_grad():
        sr = load_network(tmp_path / "out").module(lr)
    assert psnr_y(sr, hr) > psnr_y(upsample(lr), hr) + 0.05


def test_training_starts_from_given_weights(data, tmp_path):
    """With one step at a rate of almost nothing the given weights come out again."""
    run(TINY, data=data, out=tmp_path / "first", runtime=Runtime())
    config = TINY.model_copy(update={"iterations": 1, "learning_rate": 1e-12, "seed": 9})
    for init in (tmp_path / "first", tmp_path / "first/weights.pth"):
        out = tmp_path / init.name / "second"
        run(config, data=data, out=out, runtime=Runtime(), init=init)
        lr = torch.rand(1, 3, 8, 8)
        torch.testing.assert_close(load_network(out).module(lr), load_network(init).module(lr), rtol=0, atol=1e-6)
    run(config, data=data, out=tmp_path / "random", runtime=Runtime())
    assert not torch.allclose(load_network(tmp_path / "random").module(lr), load_network(out).module(lr), atol=1e-3)


def test_weights_of_another_network_or_scale_are_refused(data, tmp_path):
    run(TINY, data=data, out=tmp_path / "first", runtime=Runtime())
    for changes in ({"scale": 2}, {"arch_kwargs": {"feat": 16, "blocks": 1}}, {"arch": "rcan-small", "arch_kwargs": {}}):
        config = TINY.model_copy(update=changes)
        with pytest.raises(InputError, match="weights do not fit"):
            run(config, data=data, out=tmp_path / "second", runtime=Runtime(), init=tmp_path / "first")
    with pytest.raises(InputError, match="no weights file"):
        run(TINY, data=data, out=tmp_path / "second", runtime=Runtime(), init=tmp_path / "nothing.pth")
