"""Evaluation on a pretended CUDA device: every metric, no tensor left on the CPU, the numbers of the CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data as photos

from ddsr_core.config import Runtime
from ddsr_core.evaluation import evaluate, evaluator
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.imaging.images import save_png
from ddsr_core.metrics import dists
from tests.helpers.interruption import digests
from tests.helpers.pretended_device import pretended_cuda
from tests.helpers.sample_inputs import write_teacher
from tests.unit.metrics.test_dists import random_weights

METRICS = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "lpips", "lpips_vgg", "dists")


@pytest.fixture(scope="module")
def test_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    for index, place in enumerate((0, 200)):
        save_png(folder / f"{index}.png", np.ascontiguousarray(photos.astronaut()[place : place + 96, place : place + 100]))
    return folder


@pytest.mark.parametrize("tile_px", [0, 16])
def test_evaluation_gives_the_bytes_of_the_cpu(
    test_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tile_px: int
):
    weights_of_dists = tmp_path / "hub" / "checkpoints" / "dists_weights.pt"
    weights_of_dists.parent.mkdir(parents=True)
    torch.save(random_weights(3), weights_of_dists)
    monkeypatch.setattr(dists, "_installed", lambda: None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(evaluator, "_LAST", evaluator._LastTestSet())  # another test's features are on another device
    config = EvaluateConfig(metrics=METRICS, crops=1, crop_px=48, tile_px=tile_px, tile_overlap_px=4)
    weights = write_teacher(tmp_path / "network")
    evaluate.run(config, test=test_set, weights=weights, out=tmp_path / "cpu", runtime=Runtime())
    with pretended_cuda():
        evaluate.run(config, test=test_set, weights=weights, out=tmp_path / "cuda", runtime=Runtime(device="cuda"))
    assert digests(tmp_path / "cuda") == digests(tmp_path / "cpu")
