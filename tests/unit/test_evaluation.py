"""The evaluation stage: known figures, resuming, bad images, pairs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from skimage import data as photos

from ddsr_core import evaluation
from ddsr_core.bicubic import make_lr, upsample
from ddsr_core.config import Runtime
from ddsr_core.errors import InputError, MissingWeightsError
from ddsr_core.evaluation import METRICS, EvaluateConfig, evaluate_network, mean_scores
from ddsr_core.images import read_rgb, save_png, to_float, to_uint8
from ddsr_core.store import RESUME

CHEAP = EvaluateConfig(lpips=False, crops=2, crop_px=48)


@pytest.fixture
def test_set(tmp_path: Path) -> Path:
    """Four cut-outs of a photo, one of them grey and one with odd sides."""
    photo = photos.astronaut()
    folder = tmp_path / "set"
    save_png(folder / "a.png", photo[:96, :120])
    save_png(folder / "b.png", photo[100:199, 200:303])
    save_png(folder / "c.png", np.repeat(photo[200:300, 100:200, 1:2], 3, 2))
    save_png(folder / "sub" / "a.png", photo[300:396, 300:396])
    return folder


def files(out: Path) -> dict[str, bytes]:
    """Everything but what the store removes."""
    paths = (p for p in sorted(out.rglob("*")) if p.is_file() and RESUME not in p.parts)
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in paths}


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_bytes())


def test_bicubic_row(test_set: Path, tmp_path: Path) -> None:
    result = evaluation.run(CHEAP, test=test_set, out=tmp_path / "out", runtime=Runtime())
    rows = pq.read_table(tmp_path / "out" / "per_image.parquet").to_pylist()
    assert [row["image"] for row in rows] == ["a.png", "b.png", "c.png", "sub/a.png"]
    assert [(row["height"], row["width"]) for row in rows] == [(96, 120), (96, 100), (100, 100), (96, 96)]
    assert all(15 < row["psnr_y"] < 45 and row["lpips"] is None for row in rows)
    written = summary(tmp_path / "out")
    assert written["network"] == "bicubic"
    assert (written["images"], written["identical"], written["skipped"]) == (4, 0, [])
    assert set(written["metrics"]) == set(METRICS)
    assert written["metrics"]["psnr_y"] == pytest.approx(np.mean([row["psnr_y"] for row in rows]))
    assert result.counts["metrics"] == written["metrics"]


def test_memory_and_files_agree(test_set: Path, tmp_path: Path) -> None:
    evaluation.run(CHEAP, test=test_set, out=tmp_path / "out", runtime=Runtime())
    images = [(name, read_rgb(test_set / name)) for name in ("a.png", "b.png", "c.png", "sub/a.png")]
    scores = evaluate_network(lambda lr: upsample(lr, 4), images, CHEAP)
    assert mean_scores(scores) == summary(tmp_path / "out")["metrics"]


def test_closeups_show_the_same_place_for_every_network(test_set: Path, tmp_path: Path) -> None:
    evaluation.run(CHEAP, test=test_set, out=tmp_path / "out", runtime=Runtime())
    entries = summary(tmp_path / "out")["crops"]
    assert [entry["image"] for entry in entries] == ["b.png", "sub/a.png"]
    for entry in entries:
        top, left, side = entry["y"], entry["x"], entry["px"]
        hr = read_rgb(test_set / entry["image"])
        assert np.array_equal(read_rgb(tmp_path / "out" / entry["hr"]), hr[top : top + side, left : left + side])
        bicubic = read_rgb(tmp_path / "out" / entry["bicubic"])
        assert bicubic.shape == (48, 48, 3)
        assert np.array_equal(bicubic, read_rgb(tmp_path / "out" / entry["sr"]))


def test_the_hardest_square() -> None:
    hr = np.zeros((60, 80, 3), np.uint8)
    hr[33:41, 50:58] = 200
    top, left, side = evaluation._hardest_square(hr, np.zeros_like(hr), 20)
    assert side == 20
    assert top <= 33
    assert top + side >= 41
    assert left <= 50
    assert left + side >= 58
    assert evaluation._hardest_square(hr, hr, 100) == (0, 0, 60)


def test_pairs_give_what_made_lr_gives(test_set: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    for name in ("a", "b", "c"):
        hr = read_rgb(test_set / f"{name}.png")
        hr = hr[: hr.shape[0] // 4 * 4, : hr.shape[1] // 4 * 4]
        save_png(pairs / "HR" / f"{name}.png", hr)
        save_png(pairs / "LRx4" / f"{name}{'x4' if name == 'b' else ''}.png", to_uint8(make_lr(to_float(hr)))[0])
    evaluation.run(CHEAP, test=pairs, out=tmp_path / "given", runtime=Runtime())
    evaluation.run(CHEAP, test=pairs / "HR", out=tmp_path / "made", runtime=Runtime())
    assert files(tmp_path / "given") == files(tmp_path / "made")


def test_pairs_without_partner_or_of_another_size_are_skipped(test_set: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    hr = read_rgb(test_set / "a.png")
    for name in ("good", "lonely", "wrong"):
        save_png(pairs / "HR" / f"{name}.png", hr)
    save_png(pairs / "LRx4" / "good.png", to_uint8(make_lr(to_float(hr)))[0])
    save_png(pairs / "LRx4" / "wrong.png", hr[:30, :30])
    evaluation.run(CHEAP, test=pairs, out=tmp_path / "out", runtime=Runtime())
    written = summary(tmp_path / "out")
    assert written["images"] == 1
    assert {entry["file"]: entry["reason"] for entry in written["skipped"]} == {
        "lonely.png": "has no LR partner",
        "wrong.png": "LR 30x30 is not HR 120x96 divided by 4",
    }


def test_bad_images_are_counted_and_do_not_stop(test_set: Path, tmp_path: Path) -> None:
    (test_set / "broken.png").write_bytes(b"\x89PNG but not much more")
    save_png(test_set / "tiny.png", np.zeros((31, 90, 3), np.uint8))
    result = evaluation.run(CHEAP, test=test_set, out=tmp_path / "out", runtime=Runtime())
    assert (result.counts["images"], result.counts["skipped"]) == (4, 2)
    assert [entry["file"] for entry in summary(tmp_path / "out")["skipped"]] == ["broken.png", "tiny.png"]


def test_nothing_that_can_be_measured(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images"):
        evaluation.run(CHEAP, test=tmp_path / "empty", out=tmp_path / "out", runtime=Runtime())
    save_png(tmp_path / "tiny" / "one.png", np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(InputError, match=r"none of 1 test images could be measured; one.png: too small"):
        evaluation.run(CHEAP, test=tmp_path / "tiny", out=tmp_path / "out", runtime=Runtime())


def test_identical_images_are_left_out_of_mean_psnr(tmp_path: Path) -> None:
    save_png(tmp_path / "set" / "black.png", np.zeros((64, 64, 3), np.uint8))
    save_png(tmp_path / "set" / "photo.png", photos.astronaut()[:64, :64])
    evaluation.run(CHEAP, test=tmp_path / "set", out=tmp_path / "out", runtime=Runtime())
    rows = pq.read_table(tmp_path / "out" / "per_image.parquet").to_pylist()
    assert rows[0]["psnr_y"] == float("inf")
    written = summary(tmp_path / "out")
    assert written["identical"] == 1
    assert written["metrics"]["psnr_y"] == rows[1]["psnr_y"]
    assert written["metrics"]["ssim_y"] == pytest.approx((1 + rows[1]["ssim_y"]) / 2)


def test_killed_and_run_again_gives_the_same_bytes(test_set: Path, tmp_path: Path) -> None:
    """A process that dies without warning at the third image and is run again, against an undisturbed one."""
    script = f"""
import os, sys
from pathlib import Path
from ddsr_core import evaluation
from ddsr_core.config import Runtime
measure = evaluation.Evaluator.measure
def dying(self, name, *rest):
    if name == "c.png":
        os.kill(os.getpid(), 9)
    return measure(self, name, *rest)
evaluation.Evaluator.measure = dying
config = evaluation.EvaluateConfig.model_validate_json({CHEAP.model_dump_json()!r})
test, out = Path({str(test_set)!r}), Path({str(tmp_path / "killed")!r})
evaluation.run(config, test=test, out=out, runtime=Runtime())
"""
    died = subprocess.run([sys.executable, "-c", script], timeout=120, check=False)
    assert died.returncode == -9
    assert sorted(p.name for p in (tmp_path / "killed" / RESUME).iterdir()) == ["000000.json", "000001.json"]
    evaluation.run(CHEAP, test=test_set, out=tmp_path / "killed", runtime=Runtime())
    evaluation.run(CHEAP, test=test_set, out=tmp_path / "whole", runtime=Runtime())
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_config_refuses_what_cannot_work() -> None:
    with pytest.raises(ValidationError, match="multiple of scale"):
        EvaluateConfig(mod_crop=6)
    with pytest.raises(ValidationError, match="more than twice"):
        EvaluateConfig(tile_px=96)


def test_lpips_without_a_trunk_is_an_error_not_a_number(
    test_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> dict[str, torch.Tensor]:
        raise MissingWeightsError("no trunk")

    monkeypatch.setattr("ddsr_core.lpips_metric.load_trunk", missing)
    with pytest.raises(MissingWeightsError, match="no trunk"):
        evaluation.run(EvaluateConfig(), test=test_set, out=tmp_path / "out", runtime=Runtime())
    assert files(tmp_path / "out") == {}


def test_the_config_does_not_import_torch() -> None:
    code = "import sys, ddsr_core.evaluation; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


@pytest.fixture
def shared() -> Path:
    if not os.environ.get("DDSR_SHARED"):
        pytest.skip("DDSR_SHARED is not set")
    return Path(os.environ["DDSR_SHARED"]) / "data"


@pytest.mark.shared
@pytest.mark.slow
def test_bicubic_on_b100(shared: Path, tmp_path: Path) -> None:
    """Published 25.96 / .6675, the latter with Y rounded to 8 bits; see `ddsr_core.metrics`."""
    config = EvaluateConfig(lpips=False, crops=0)
    evaluation.run(config, test=shared / "bsds500" / "val", out=tmp_path, runtime=Runtime())
    written = summary(tmp_path)
    assert written["images"] == 100
    assert written["metrics"]["psnr_y"] == pytest.approx(25.963, abs=1e-3)
    assert written["metrics"]["ssim_y"] == pytest.approx(0.6682, abs=1e-4)


@pytest.mark.shared
def test_bicubic_on_set5(shared: Path, tmp_path: Path) -> None:
    """Figures measured with basicsr and lpips on the set's own HR images."""
    evaluation.run(EvaluateConfig(crops=0), test=shared / "test" / "Set5" / "HR", out=tmp_path, runtime=Runtime())
    found = summary(tmp_path)["metrics"]
    assert found["psnr_y"] == pytest.approx(28.43, abs=5e-3)
    assert found["ssim_y"] == pytest.approx(0.8113, abs=1e-4)
    assert found["lpips"] == pytest.approx(0.341, abs=1e-3)


@pytest.mark.shared
def test_the_published_bicubic_row_has_y_rounded_to_8_bits(shared: Path) -> None:
    """28.42 / .8104 on Set5: Y rounded, reduced and enlarged by itself, rounded again."""
    from ddsr_core.bicubic import downsample
    from ddsr_core.metrics import _ssim, rgb_to_y

    psnr, ssim = [], []
    for path in sorted((shared / "test" / "Set5" / "HR").glob("*.png")):
        image = read_rgb(path)
        height, width = (side - side % 4 for side in image.shape[:2])
        y = rgb_to_y(to_float(image[:height, :width]) * 255).round()
        enlarged = upsample(downsample(y)).round().clamp(0, 255)
        pair = y[..., 4:-4, 4:-4], enlarged[..., 4:-4, 4:-4]
        psnr.append(20 * np.log10(255) - 10 * np.log10((pair[0] - pair[1]).double().square().mean().item()))
        ssim.append(_ssim(*pair).item())
    assert np.mean(psnr) == pytest.approx(28.42, abs=5e-3)
    assert np.mean(ssim) == pytest.approx(0.8104, abs=1e-4)
