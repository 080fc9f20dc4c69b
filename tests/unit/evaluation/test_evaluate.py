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
from skimage import data as photos

from ddsr_core.config import Runtime
from ddsr_core.errors import InputError, MissingWeightsError
from ddsr_core.evaluation import evaluate as evaluation
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.evaluation.evaluate import evaluate_network
from ddsr_core.evaluation.scores import mean_scores
from ddsr_core.imaging.bicubic import make_lr, upsample
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.images import save_png, to_float, to_uint8
from ddsr_core.metrics.spec import DEFAULT_METRICS
from ddsr_core.storage.stage import RESUME

CHEAP = EvaluateConfig(metrics=("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"), crops=2, crop_px=48)


@pytest.fixture
def test_set(tmp_path: Path) -> Path:
    """Four cut-outs of a photo, one of them gray and one with odd sides."""
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
    assert set(written["metrics"]) == set(DEFAULT_METRICS)
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
    given, made = files(tmp_path / "given"), files(tmp_path / "made")
    assert json.loads(given.pop("summary.json")) == json.loads(made.pop("summary.json")) | {"lr": "given"}
    assert given == made


def test_pairs_that_do_not_match_stop_before_any_work(test_set: Path, tmp_path: Path) -> None:
    save_png(tmp_path / "pairs" / "HR" / "a.png", read_rgb(test_set / "a.png"))
    save_png(tmp_path / "pairs" / "LRx4" / "a.png", read_rgb(test_set / "a.png")[:30, :30])
    with pytest.raises(InputError, match="LR 30x30 is not HR 120x96 divided by 4"):
        evaluation.run(CHEAP, test=tmp_path / "pairs", out=tmp_path / "out", runtime=Runtime())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_known_features_change_no_byte(test_set: Path, tmp_path: Path, threads: int) -> None:
    """Another network's evaluation on the same photos comes second and finds their LPIPS features known."""
    config = CHEAP.model_copy(update={"lpips": True})
    before = torch.get_num_threads()
    first = tmp_path / "first"
    for name in ("first", "second"):
        torch.set_num_threads(threads)
        evaluation.run(config, test=test_set, out=tmp_path / name, runtime=Runtime())
        assert torch.get_num_threads() == threads
        torch.set_num_threads(before)
    assert files(first) == files(tmp_path / "second")
    alone = evaluate_network(lambda lr: upsample(lr, 4), [("b.png", read_rgb(test_set / "b.png"))], config)
    assert alone[0].row() == pq.read_table(first / "per_image.parquet").to_pylist()[1]


def test_features_of_hr_images_are_computed_once(test_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddsr_core.evaluation.evaluator import ReferenceFeatures, reference_features
    from ddsr_core.metrics.lpips import Lpips

    seen: list[int] = []
    features = Lpips.features
    monkeypatch.setattr(Lpips, "features", lambda self, image: seen.append(image.shape[-1]) or features(self, image))
    lpips = Lpips()
    image = read_rgb(test_set / "a.png")
    kept = reference_features(test_set)
    first = kept.of(image, lpips)
    assert kept.of(image.copy(), lpips) is first
    assert reference_features(test_set) is kept
    assert seen == [120]
    other = image.copy()
    other[5, 5] ^= 1
    assert not torch.equal(kept.of(other, lpips)[0], first[0])
    assert reference_features(test_set / "sub") is not kept
    full = ReferenceFeatures(most_bytes=1000)
    assert full.of(image, lpips) is not full.of(image, lpips)


def test_a_network_is_called_on_one_thread(test_set: Path) -> None:
    import threading

    callers = set()

    def network(lr: torch.Tensor) -> torch.Tensor:
        callers.add(threading.current_thread())
        return upsample(lr, 4)

    images = [(path.name, read_rgb(path)) for path in sorted(test_set.glob("*.png"))]
    assert len(evaluate_network(network, images, CHEAP)) == 3
    assert callers == {threading.current_thread()}


def test_what_the_network_cannot_take_stops_the_evaluation(test_set: Path) -> None:
    with pytest.raises(InputError, match="not x4"):
        evaluate_network(lambda lr: upsample(lr, 2), [("a.png", read_rgb(test_set / "a.png"))], CHEAP)


def test_an_error_while_scoring_is_not_lost(test_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("ddsr_core.evaluation.evaluator.fidelity", failing)
    before = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    with pytest.raises(MemoryError, match="no room"):
        evaluation.run(CHEAP, test=test_set, out=tmp_path, runtime=Runtime())
    assert (torch.get_num_threads(), torch.backends.cudnn.allow_tf32) == before


def test_rounded_y_and_more_metrics_are_recorded(test_set: Path, tmp_path: Path) -> None:
    evaluation.run(CHEAP, test=test_set, out=tmp_path / "plain", runtime=Runtime())
    config = CHEAP.model_copy(update={"round_y": True, "metrics": (*CHEAP.metrics, "lpips_vgg")})
    evaluation.run(config, test=test_set, out=tmp_path / "more", runtime=Runtime())
    plain, more = summary(tmp_path / "plain"), summary(tmp_path / "more")
    assert (plain["y"], plain["lr"], more["y"]) == ("not rounded", "made from HR", "rounded")
    assert set(more["metrics"]) == {*DEFAULT_METRICS, "lpips_vgg"}
    assert more["metrics"]["ssim_y"] != plain["metrics"]["ssim_y"]
    assert more["metrics"]["ssim_rgb"] == plain["metrics"]["ssim_rgb"]
    assert 0.1 < more["metrics"]["lpips_vgg"] < 0.8
    rows = pq.read_table(tmp_path / "plain" / "per_image.parquet").to_pylist()
    assert rows[0]["lpips_vgg"] is rows[0]["dists"] is None


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
from ddsr_core.config import Runtime
from ddsr_core.evaluation import evaluate as evaluation
from ddsr_core.evaluation.config import EvaluateConfig
import torch
from ddsr_core.evaluation.evaluator import Evaluator
torch.set_num_threads(1)
score = Evaluator.score
def dying(self, image):
    if image.name == "c.png":
        while not (out / "resume" / "000000.json").is_file():
            pass
        os.kill(os.getpid(), 9)
    return score(self, image)
Evaluator.score = dying
config = EvaluateConfig.model_validate_json({CHEAP.model_dump_json()!r})
test, out = Path({str(test_set)!r}), Path({str(tmp_path / "killed")!r})
evaluation.run(config, test=test, out=out, runtime=Runtime())
"""
    died = subprocess.run([sys.executable, "-c", script], timeout=120, check=False)
    assert died.returncode == -9
    done = {p.name for p in (tmp_path / "killed" / RESUME).iterdir() if p.suffix == ".json"}
    assert {"000000.json"} <= done <= {"000000.json", "000001.json"}
    evaluation.run(CHEAP, test=test_set, out=tmp_path / "killed", runtime=Runtime())
    evaluation.run(CHEAP, test=test_set, out=tmp_path / "whole", runtime=Runtime())
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_lpips_without_a_trunk_is_an_error_not_a_number(
    test_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(net: str) -> dict[str, torch.Tensor]:
        raise MissingWeightsError("no trunk")

    monkeypatch.setattr("ddsr_core.metrics.lpips.load_trunk", missing)
    with pytest.raises(MissingWeightsError, match="no trunk"):
        evaluation.run(EvaluateConfig(), test=test_set, out=tmp_path / "out", runtime=Runtime())
    assert files(tmp_path / "out") == {}


@pytest.fixture
def shared() -> Path:
    if not os.environ.get("DDSR_SHARED"):
        pytest.skip("DDSR_SHARED is not set")
    return Path(os.environ["DDSR_SHARED"]) / "data"


def test_dists_without_its_weights_is_an_error_not_a_number(
    test_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddsr_core.metrics.dists._installed", lambda: None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    config = CHEAP.model_copy(update={"metrics": (*CHEAP.metrics, "dists")})
    with pytest.raises(MissingWeightsError, match="DISTS"):
        evaluation.run(config, test=test_set, out=tmp_path / "out", runtime=Runtime())
    assert files(tmp_path / "out") == {}


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize(("round_y", "psnr_y", "ssim_y"), [(False, 25.963, 0.6682), (True, 25.961, 0.6674)])
def test_bicubic_on_b100(shared: Path, tmp_path: Path, round_y: bool, psnr_y: float, ssim_y: float) -> None:
    """Published 25.96 / .6675, the latter with Y rounded to 8 bits; see `ddsr_core.metrics.psnr_ssim`."""
    config = EvaluateConfig(metrics=("psnr_y", "ssim_y"), crops=0, round_y=round_y)
    evaluation.run(config, test=shared / "bsds500" / "val", out=tmp_path, runtime=Runtime())
    written = summary(tmp_path)
    assert written["images"] == 100
    assert written["metrics"]["psnr_y"] == pytest.approx(psnr_y, abs=1e-3)
    assert written["metrics"]["ssim_y"] == pytest.approx(ssim_y, abs=1e-4)


@pytest.mark.shared
def test_bicubic_on_set5(shared: Path, tmp_path: Path) -> None:
    """Figures measured with basicsr and lpips on the set's own HR images."""
    evaluation.run(EvaluateConfig(crops=0), test=shared / "test" / "Set5" / "HR", out=tmp_path, runtime=Runtime())
    found = summary(tmp_path)["metrics"]
    assert found["psnr_y"] == pytest.approx(28.43, abs=5e-3)
    assert found["ssim_y"] == pytest.approx(0.8113, abs=1e-4)
    assert found["lpips"] == pytest.approx(0.341, abs=1e-3)


@pytest.mark.shared
@pytest.mark.parametrize(("scale", "psnr_y", "ssim_y"), [(2, 33.66, 0.9299), (3, 30.39, 0.8682), (4, 28.42, 0.8104)])
def test_the_published_bicubic_rows_of_set5(shared: Path, tmp_path: Path, scale: int, psnr_y: float, ssim_y: float) -> None:
    config = EvaluateConfig(scale=scale, metrics=("psnr_y", "ssim_y"), crops=0, round_y=True)
    evaluation.run(config, test=shared / "test" / "Set5" / "HR", out=tmp_path, runtime=Runtime())
    written = summary(tmp_path)
    assert written["crop_border_px"] == written["mod_crop"] == scale
    assert written["metrics"]["psnr_y"] == pytest.approx(psnr_y, abs=5e-3)
    assert written["metrics"]["ssim_y"] == pytest.approx(ssim_y, abs=5e-5)


@pytest.mark.shared
def test_the_published_bicubic_row_has_y_rounded_to_8_bits(shared: Path) -> None:
    """28.42 / .8104 on Set5: Y rounded, reduced and enlarged by itself, rounded again."""
    from ddsr_core.imaging.bicubic import downsample
    from ddsr_core.metrics.psnr_ssim import _ssim, rgb_to_y

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
