"""Options of the commands on one SR network."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from ddsr_core.baselines.names import TRAINING_SETS
from ddsr_core.imaging.images import save_png
from ddsr_core.metrics.spec import METRICS
from tests.helpers.cli import ddsr

TINY = (
    "--iterations", "1", "--set", "lr_patch_px=8", "--set", "batch_size=1", "--set", "arch_kwargs={feat=4, blocks=1}",
    "--device", "cpu", "--json",
)  # fmt: skip


def assert_failed(result: Result, *texts: str) -> None:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    for text in texts:
        assert text in result.output


def photos(folder: Path, count: int = 3) -> Path:
    for index in range(count):
        random = np.random.default_rng(index)
        save_png(folder / f"{index}.png", random.integers(0, 256, (64, 64, 3), np.uint8))
    return folder


@pytest.mark.parametrize("kind", [name for name, training_set in TRAINING_SETS.items() if training_set.generated])
def test_photos_do_not_pass_for_a_generated_training_set(tmp_path: Path, kind: str):
    folder = photos(tmp_path / "photos")
    result = ddsr("train-sr", "--data", folder, "--training-set", kind, *TINY, "--home", tmp_path / "home")
    assert_failed(result, f"not a {kind} set", "--training-set full")


def test_old_and_new_names_of_the_options_mean_the_same(tmp_path: Path):
    folder, home = photos(tmp_path / "photos"), tmp_path / "home"
    new = ddsr(
        "train-sr", "--data", folder, "--training-set", "random", "--count", 2, "--patch-px", 32, *TINY, "--home", home
    )
    old = ddsr("train-sr", "--data", folder, "--source", "random", "--budget", 2, "--patch-px", 32, *TINY, "--home", home)
    assert json.loads(new.stdout)["images"] == 2
    assert not json.loads(new.stdout)["cached"]
    assert json.loads(old.stdout)["cached"]


def test_every_metric_can_be_asked_for():
    text = " ".join(ddsr("evaluate", "--help").output.split())
    assert "|".join(METRICS) in text.replace("| ", "|").replace(" |", "|")


def test_a_training_with_test_photos_prints_its_best_weights(tmp_path: Path):
    options = (
        "--iterations", 2, "--set", "lr_patch_px=8", "--set", "batch_size=1", "--set", "arch_kwargs={feat=4, blocks=1}",
        "--device", "cpu", "--home", tmp_path / "home",
    )  # fmt: skip
    data, test = photos(tmp_path / "photos"), photos(tmp_path / "test", 1)
    result = ddsr("train-sr", "--data", data, "--test", test, "--val-every", 1, "--val-metric", "ssim_y", *options)
    assert result.exit_code == 0, result.output
    assert "Best of the validation (step" in result.stdout
    assert "SSIM-Y" in result.stdout
    best = next((tmp_path / "home/artifacts/train_sr").glob("*/best/weights.safetensors"))
    again = ddsr("train-sr", "--data", data, "--init", best, "--report-to", "tensorboard", *options)
    assert again.exit_code == 0, again.output
    assert list((tmp_path / "home/tracking").rglob("events*"))


def test_options_of_the_validation_need_test_photos(tmp_path: Path):
    result = ddsr("train-sr", "--data", tmp_path, "--val-every", 5)
    assert result.exit_code == 2
    assert "need --test" in result.output
