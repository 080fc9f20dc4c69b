"""The pipeline at another scale than the paper's: every stage follows the one field."""

import json
from pathlib import Path

import pytest

from ddsr_core.imaging.bicubic import psnr_bic
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.image_sets import read_image_set
from ddsr_core.imaging.images import to_float
from ddsr_core.pipeline.request import RunRequest
from ddsr_core.pipeline.run import run_plainly
from ddsr_core.sr.weights import load_network
from tests.helpers.commands import TINY, make_photos


@pytest.mark.slow
def test_a_run_at_x2_scores_samples_restores_trains_and_evaluates_at_x2(tmp_path: Path):
    train, test = make_photos(tmp_path / "train", 3), make_photos(tmp_path / "test", 1, first=9)
    overrides = (*TINY, "scale=2", "sample.detail_restoration=0.5", "sr.training_sets=['distilled', 'random']")
    request = RunRequest(images=train, test=test, overrides=overrides, home=str(tmp_path / "home"), device="cpu")
    done = run_plainly(request)

    images = done.folder / "distilled"
    for row in read_image_set(images):
        measured = float(psnr_bic(to_float(read_rgb(images / row["file_name"])), scale=2))
        assert row["psnr_bic"] == pytest.approx(measured, abs=1e-3)
    artifacts = tmp_path / "home/artifacts"
    networks = list(artifacts.glob("train_sr/*"))
    assert len(networks) == 3  # the teacher, and one per training set
    assert {load_network(folder).scale for folder in networks} == {2}
    evaluated = [json.loads(path.read_text()) for path in artifacts.glob("evaluate/*/summary.json")]
    assert len(evaluated) == 3  # bicubic and two networks
    assert {summary["scale"] for summary in evaluated} == {2}
    manifests = [json.loads(path.read_text()) for path in artifacts.glob("*/*/manifest.json")]
    scaled = {manifest["stage"]: manifest["config"]["scale"] for manifest in manifests if "scale" in manifest["config"]}
    assert set(scaled) >= {"patches", "latents", "finetune", "sample", "crops", "train_sr", "evaluate"}
    assert set(scaled.values()) == {2}
