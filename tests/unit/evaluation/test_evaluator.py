"""A metric of one file and one line is measured, averaged and written."""

import sys
import types
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import skimage
import torch

from ddsr_core.config import Runtime
from ddsr_core.evaluation import evaluate as evaluation
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.evaluation.evaluator import Bicubic, Evaluator
from ddsr_core.imaging.bicubic import downsample, upsample
from ddsr_core.imaging.images import save_png
from ddsr_core.metrics import spec
from ddsr_core.metrics.lpips import Lpips


class MeanError:
    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, sr: torch.Tensor, hr: torch.Tensor) -> torch.Tensor:
        return (sr - hr).abs().mean((1, 2, 3))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and the line of a new metric."""
    module = types.ModuleType("toy_metric")
    module.MeanError = MeanError
    monkeypatch.setitem(sys.modules, "toy_metric", module)
    line = spec.Metric("mae", "MAE", higher_is_better=False, default=False, measure="toy_metric:MeanError")
    monkeypatch.setitem(spec.METRICS, "mae", line)


@pytest.mark.usefixtures("toy")
def test_a_new_metric_is_measured_and_written(tmp_path: Path):
    image = np.zeros((64, 64, 3), np.uint8)
    image[:32] = 200
    save_png(tmp_path / "set/edge.png", image)
    save_png(tmp_path / "set/flat.png", np.full((64, 64, 3), 90, np.uint8))
    config = EvaluateConfig(metrics=("mae",), crops=0)
    result = evaluation.run(config, test=tmp_path / "set", out=tmp_path / "out", runtime=Runtime())
    rows = pq.read_table(tmp_path / "out/per_image.parquet").to_pylist()
    assert [row["image"] for row in rows] == ["edge.png", "flat.png"]
    assert rows[1]["mae"] == pytest.approx(0, abs=1e-6)
    assert 0.001 < rows[0]["mae"] < 0.1
    assert rows[0]["psnr_y"] is None
    assert result.counts["metrics"]["mae"] == pytest.approx(rows[0]["mae"] / 2)


def test_lpips_networks_are_those_of_their_names():
    assert isinstance(spec.METRICS["lpips"].load("cpu"), Lpips)
    assert (spec.METRICS["lpips"].load("cpu").net, spec.METRICS["lpips_vgg"].load("cpu").net) == ("alex", "vgg")


@pytest.mark.parametrize("name", [name for name, metric in spec.METRICS.items() if metric.measure])
def test_the_implementation_of_every_metric_exists(name: str):
    module, _, factory = spec.METRICS[name].measure.partition(":")
    assert callable(getattr(__import__(module, fromlist=[factory]), factory))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_with_rounded_y_bicubic_enlarges_y_alone_and_networks_do_not(scale: int):
    photo = skimage.data.astronaut()[: 40 * scale, : 30 * scale]
    config = EvaluateConfig(scale=scale, metrics=("psnr_y", "psnr_rgb"), round_y=True)
    bicubic, network = Evaluator(Bicubic(scale), config, "cpu"), Evaluator(lambda lr: upsample(lr, scale), config, "cpu")
    alone, by_rgb = (evaluator.score(evaluator.enlarge("a", photo)).values for evaluator in (bicubic, network))
    weights = np.array([65.481, 128.553, 24.966]) / 255
    y = torch.from_numpy((photo @ weights + 16).round())[None, None]
    made = upsample(downsample(y, scale), scale).round()
    inside = (..., slice(scale, -scale), slice(scale, -scale))
    expected = 10 * np.log10(255**2 / (made - y)[inside].square().mean().item())
    assert alone["psnr_y"] == pytest.approx(expected, abs=2e-3)
    assert alone["psnr_y"] != by_rgb["psnr_y"]
    assert alone["psnr_rgb"] == by_rgb["psnr_rgb"]


def test_a_given_lr_image_is_what_bicubic_enlarges():
    photo = skimage.data.astronaut()[:64, :64]
    config = EvaluateConfig(metrics=("psnr_y",), round_y=True)
    evaluator = Evaluator(Bicubic(4), config, "cpu")
    given = evaluator.enlarge("a", photo, np.zeros((16, 16, 3), np.uint8))
    assert given.sr_y is None
    assert evaluator.score(given).values["psnr_y"] < 15
