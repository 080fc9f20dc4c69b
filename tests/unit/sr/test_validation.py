"""Validation during training: the curve, the best weights, early stop, pictures, and resuming."""

import csv
import hashlib
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image

from ddsr_core.config import Runtime
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.evaluation.evaluate import evaluate_network
from ddsr_core.evaluation.scores import mean_scores
from ddsr_core.imaging.bicubic import make_lr, upsample
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.images import save_png, to_float, to_uint8
from ddsr_core.sr.config import TrainSRConfig, ValidationConfig
from ddsr_core.sr.train_sr import run
from ddsr_core.sr.validation import Validated, Validator, center
from ddsr_core.sr.weights import load_network
from tests.helpers.reporting import Recorder

TINY = TrainSRConfig(
    arch="edsr-small", arch_kwargs={"feat": 8, "blocks": 1}, iterations=12, batch_size=2, lr_patch_px=8,
    learning_rate=3e-3, checkpoint_every=4, seed=3, validation=ValidationConfig(every=3, metrics=("psnr_y", "ssim_y")),
)  # fmt: skip


@pytest.fixture
def data(tmp_path):
    photo = skimage.data.astronaut()
    for index in range(3):
        save_png(tmp_path / f"data/{index}.png", photo[index * 100 : index * 100 + 48, 100:160])
    for index in range(2):
        save_png(tmp_path / f"test/{index}.png", photo[300 + index * 60 : 350 + index * 60, 200:261])
    return tmp_path / "data"


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "validation.csv").open() as file:
        return list(csv.DictReader(file))


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and "resume" not in path.parts]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_best_weights_are_those_of_the_maximum_of_the_curve(data, tmp_path):
    recorder = Recorder()
    result = run(TINY, data=data, test=tmp_path / "test", out=tmp_path / "out", runtime=Runtime(reporter=recorder.open))
    rows = rows_of(tmp_path / "out")
    assert [row["step"] for row in rows] == ["3", "6", "9", "12"]
    best = max(rows, key=lambda row: float(row["psnr_y"]))
    assert str(result.counts["best_step"]) == best["step"]
    images = [(path.name, read_rgb(path)) for path in sorted((tmp_path / "test").glob("*.png"))]
    config = EvaluateConfig(metrics=("psnr_y", "ssim_y"), crops=0)
    for folder, row in ((tmp_path / "out/best", best), (tmp_path / "out", rows[-1])):
        measured = mean_scores(evaluate_network(load_network(folder).module, images, config))
        assert measured["psnr_y"] == pytest.approx(float(row["psnr_y"]), abs=2e-6)
        assert measured["ssim_y"] == pytest.approx(float(row["ssim_y"]), abs=2e-6)
    validated = [values for _, values in recorder.rows if "val/psnr_y" in values]
    assert [f"{values['val/psnr_y']:.6f}" for values in validated] == [row["psnr_y"] for row in rows]
    assert any("train/loss" in values and "train/learning_rate" in values for _, values in recorder.rows)
    assert ("val/photos", 12) in recorder.pictures
    assert ("train/grid", 12) in recorder.pictures
    assert (recorder.name, recorder.settings["seed"]) == ("train_sr-edsr-small", 3)


def test_validation_does_not_change_the_last_weights(data, tmp_path):
    run(TINY, data=data, test=tmp_path / "test", out=tmp_path / "with", runtime=Runtime())
    run(TINY.model_copy(update={"validation": None}), data=data, out=tmp_path / "without", runtime=Runtime())
    assert digests(tmp_path / "with")["weights.safetensors"] == digests(tmp_path / "without")["weights.safetensors"]
    assert not (tmp_path / "without/best").exists()


def killed_at(step: int) -> Runtime:
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
        yield (
            Bar()
            if title.startswith("Training")
            else type("Quiet", (), {"advance": lambda *a: None, "note": lambda *a: None})()
        )

    return Runtime(progress=progress)


@pytest.mark.parametrize("step", [2, 5, 7, 11])
def test_a_training_that_is_killed_and_resumed_validates_the_same(data, tmp_path, step):
    run(TINY, data=data, test=tmp_path / "test", out=tmp_path / "whole", runtime=Runtime())
    with pytest.raises(KeyboardInterrupt):
        run(TINY, data=data, test=tmp_path / "test", out=tmp_path / "killed", runtime=killed_at(step))
    run(TINY, data=data, test=tmp_path / "test", out=tmp_path / "killed", runtime=Runtime())
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_early_stop_ends_a_training_that_gets_worse(data, tmp_path):
    """At a learning rate of 1 the first validation stays the best."""
    validation = ValidationConfig(every=2, early_stop=2, pictures=0)
    config = TINY.model_copy(update={"learning_rate": 1.0, "iterations": 400, "validation": validation, "ema_decay": 0.0})
    result = run(config, data=data, test=tmp_path / "test", out=tmp_path / "out", runtime=Runtime())
    rows = rows_of(tmp_path / "out")
    assert len(rows) < 200
    values = [float(row["psnr_y"]) for row in rows]
    assert len(values) - 1 - values.index(max(values)) == 2
    assert result.counts["steps"] == int(rows[-1]["step"]) < 400
    assert json.loads((tmp_path / "out/model.json").read_text())["steps"] == result.counts["steps"]
    assert not (tmp_path / "out/validation").exists()


def validator(tmp_path: Path, **values) -> Validator:
    return Validator(ValidationConfig(**values), tmp_path / "test", 4, "cpu")


@pytest.mark.parametrize(("metrics", "best"), [(("psnr_y",), 2), (("lpips", "psnr_y"), 1)])
def test_the_first_metric_decides_in_its_own_direction(data, tmp_path, metrics, best):
    curve = [
        Validated(step, {"psnr_y": psnr, "lpips": lpips}) for step, psnr, lpips in ((1, 20, 0.1), (2, 22, 0.3), (3, 22, 0.2))
    ]
    judged = validator(tmp_path, metrics=metrics, early_stop=2)
    assert judged.best(curve).step == best
    assert judged.gives_up(curve) == (best == 1)
    assert not judged.gives_up(curve[:2])
    assert judged.best([]) is None


def test_pictures_show_bicubic_sr_and_hr(data, tmp_path):
    checked = validator(tmp_path, metrics=("psnr_rgb",), pictures=1)
    checked.validate(lambda lr: torch.zeros(1, 3, 4 * lr.shape[2], 4 * lr.shape[3]), 5, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > picture.height
    hr = read_rgb(tmp_path / "test/0.png")[:48, :60]
    assert center(hr).shape == (48, 48, 3)
    assert np.array_equal(center(hr), hr[:, 6:54])
    bicubic = to_uint8(upsample(make_lr(to_float(hr))))[0]
    assert np.abs(bicubic.astype(int) - hr).mean() < 20


def test_given_lr_images_are_used(data, tmp_path):
    hr = read_rgb(tmp_path / "test/0.png")[:48, :60]
    save_png(tmp_path / "pairs/HR/a.png", hr)
    save_png(tmp_path / "pairs/LRx4/a.png", np.full((12, 15, 3), 7, np.uint8))
    seen = []
    checked = Validator(ValidationConfig(metrics=("psnr_y",)), tmp_path / "pairs", 4, "cpu")
    checked.validate(lambda lr: seen.append(lr) or upsample(lr, 4), 1, tmp_path / "p.png")
    assert torch.all(seen[0] == 7 / 255)


def test_photos_that_cannot_be_measured_are_left_out(data, tmp_path):
    (tmp_path / "test/broken.png").write_bytes(b"no image")
    save_png(tmp_path / "test/small.png", np.zeros((16, 60, 3), np.uint8))
    values = validator(tmp_path).validate(lambda lr: upsample(lr, 4), 1, tmp_path / "p.png").values
    for name in ("0.png", "1.png"):
        (tmp_path / "test" / name).unlink()
    assert values["psnr_y"] > 15
    with pytest.raises(InputError, match="no test photo can be measured"):
        validator(tmp_path).validate(lambda lr: upsample(lr, 4), 1, tmp_path / "p.png")


def test_a_validation_without_test_photos_is_an_error(data, tmp_path):
    with pytest.raises(ConfigError, match="needs test photos"):
        run(TINY, data=data, out=tmp_path / "out", runtime=Runtime())
