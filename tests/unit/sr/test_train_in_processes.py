"""SR training in two processes on a CPU (gloo), through accelerate: one per GPU where there are several."""

import csv
import math
import os
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor, nn

from ddsr_core.config import Runtime
from ddsr_core.errors import ConfigError, TrainingError
from ddsr_core.imaging.images import save_png
from ddsr_core.sr.config import TrainSRConfig, ValidationConfig
from ddsr_core.sr.train_sr import STAGE, run
from ddsr_core.sr.weights import load_network
from tests.helpers.interruption import digests

TINY = TrainSRConfig(
    arch="edsr-small", arch_kwargs={"feat": 8, "blocks": 1}, iterations=6, batch_size=4, lr_patch_px=8, precision="fp32",
    learning_rate=1e-3, seed=3, validation=ValidationConfig(every=2, metrics=("psnr_y",), early_stop=1, pictures=1),
)  # fmt: skip
IN_TWO = TINY.model_copy(update={"processes": 2})
#: Of the default config before it had the field `processes`.
KEY = "4ea45e3cec6201640e48ed59a8b4d893"


class Broken(nn.Module):
    """A network whose second output is not finite in process 1."""

    def __init__(self, scale: int = 4) -> None:
        super().__init__()
        self.conv, self.scale, self.calls = nn.Conv2d(3, 3, 3, padding=1), scale, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        x = nn.functional.interpolate(self.conv(x), scale_factor=self.scale)
        return x * math.nan if self.training and self.calls == 2 and os.environ["RANK"] == "1" else x


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for index in range(3):
        save_png(tmp_path / f"data/{index}.png", generator.integers(0, 256, (48, 56, 3), np.uint8))
    return tmp_path / "data"


def numbers(path: Path) -> list[list[float]]:
    with path.open() as file:
        return [[float(cell) for cell in row] for row in list(csv.reader(file))[1:]]


def test_two_processes_have_the_curve_the_validations_and_the_weights_of_one(data: Path, tmp_path: Path):
    for config in (TINY, IN_TWO):
        run(config, data=data, test=data, out=tmp_path / str(config.processes), runtime=Runtime())
    one, two = tmp_path / "1", tmp_path / "2"
    assert set(digests(one)) == set(digests(two))
    for name in ("curves.csv", "validation.csv"):
        assert len(numbers(one / name)) > 1
        for alone, together in zip(numbers(one / name), numbers(two / name), strict=True):
            assert together == pytest.approx(alone, rel=1e-3)
    weights, shared = (load_network(folder).module.state_dict() for folder in (one, two))
    for name, value in weights.items():
        assert shared[name].numpy() == pytest.approx(value.numpy(), abs=1e-4), name


def test_a_batch_that_cannot_be_shared_is_an_error_before_any_process_starts(data: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="batch of 3 crops cannot be shared equally by 2 processes"):
        run(IN_TWO.model_copy(update={"batch_size": 3}), data=data, test=data, out=tmp_path / "out", runtime=Runtime())
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_in_one_process_ends_all_with_its_message(data: Path, tmp_path: Path):
    config = IN_TWO.model_copy(update={"arch": f"{__name__}:Broken", "arch_kwargs": {}})
    with pytest.raises(TrainingError, match="L1 loss is nan at step 2 of"):
        run(config, data=data, test=data, out=tmp_path / "out", runtime=Runtime())


def test_trainings_in_one_process_keep_their_keys():
    assert STAGE.key(TrainSRConfig(), {}) == KEY
    assert STAGE.key(TrainSRConfig(processes=2), {}) != KEY
