"""Commands of SR networks: evaluate, upscale, train-sr, export-sr."""

import json
from pathlib import Path

import pytest
import torch

from ddsr_core.baselines.names import TRAINING_SETS
from ddsr_core.sr.networks import build_network
from ddsr_core.sr.weights import save_weights
from tests.helpers.cli import assert_failed, ddsr, photos


def test_evaluate_bicubic_writes_the_metrics(tmp_path: Path):
    out = tmp_path / "bicubic.json"
    result = ddsr(
        "evaluate", "--weights", "bicubic", "--test", photos(tmp_path / "p", 1), "--json", out, "--no-lpips",
        "--home", tmp_path / "home",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    metrics = json.loads(out.read_text())["metrics"]
    assert set(metrics) == {"psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "lpips"}
    assert 5 < metrics["psnr_y"] < 30


def test_evaluate_several_weights_with_bicubic_beside_them(tmp_path: Path):
    kwargs = {"feat": 8, "blocks": 1}
    for name in ("one", "two"):
        with torch.random.fork_rng():
            torch.manual_seed(len(name))
            save_weights(tmp_path / name, build_network("edsr-small", kwargs), "edsr-small", kwargs, 4, {})
    out, folder = tmp_path / "both.json", photos(tmp_path / "p", 1)
    result = ddsr(
        "evaluate", "--weights", tmp_path / "one", "--weights", tmp_path / "two", "--test", folder, "--json", out,
        "--no-lpips", "--round-y", "--mod-crop", 8, "--home", tmp_path / "home",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "bicubic: 1 images" in result.output
    summaries = json.loads(out.read_text())
    assert [summary["network"] for summary in summaries] == ["edsr-small", "edsr-small"]
    assert [(summary["mod_crop"], summary["y"]) for summary in summaries] == [(8, "rounded")] * 2
    other = ddsr("evaluate", "--weights", tmp_path / "one", "--test", folder, "--scale", 2, "--home", tmp_path / "home")
    assert_failed(other, "the weights enlarge x4, the evaluation is for x2")


def test_upscale_says_by_how_much(tmp_path: Path):
    kwargs = {"feat": 8, "blocks": 1}
    save_weights(tmp_path / "w", build_network("edsr-small", kwargs), "edsr-small", kwargs, 4, {})
    folder = photos(tmp_path / "p", 1)
    home = ("--home", tmp_path / "home")
    done = ddsr("upscale", folder, tmp_path / "big", "--weights", tmp_path / "w", "--device", "cpu", *home)
    assert "edsr-small x4: 1 written, 0 skipped" in done.output
    for name in ("b.dng", "a.dng", "c.heics"):
        (folder / name).write_bytes(b"raw")
    some = ddsr("upscale", folder, tmp_path / "some", "--weights", tmp_path / "w", "--device", "cpu", *home)
    assert some.exit_code == 3
    assert "edsr-small x4: 1 written, 3 skipped" in some.output
    assert f"  2 skipped, unsupported: .dng: {folder / 'a.dng'}, {folder / 'b.dng'}\n" in some.output
    refused = ddsr("upscale", folder, tmp_path / "more", "--weights", tmp_path / "w", "--scale", 2, *home)
    assert_failed(refused, "the weights enlarge x4, not x2")


def test_unknown_weights_are_one_message(tmp_path: Path):
    (tmp_path / "w.pth").write_bytes(b"not weights")
    folder = photos(tmp_path / "p", 1)
    for weights in (tmp_path / "w.pth", tmp_path / "none.pth"):
        assert_failed(ddsr("evaluate", "--weights", weights, "--test", folder, "--home", tmp_path / "home"), weights.name)


def test_train_sr_knows_every_source(tmp_path: Path):
    text = " ".join(ddsr("train-sr", "--help").output.split())
    assert "|".join(TRAINING_SETS) in text.replace("| ", "|").replace(" |", "|").replace("- ", "-")
    result = ddsr("train-sr", "--data", tmp_path, "--source", "k-centre")
    assert result.exit_code == 2
    assert "k-center" in result.output


@pytest.mark.parametrize(
    ("source", "images"), [("random", 2), ("k-center", 2), ("hdc", 2), ("full-thresholded", 14), ("full", 3)]
)
def test_train_sr_on_a_source(tmp_path: Path, source: str, images: int):
    """k-center and HDC choose 2 of 40 crops; half of 3 x 9 windows pass the threshold; other sources are DATA."""
    result = ddsr(
        "train-sr", "--data", photos(tmp_path / "photos", side=64), "--source", source, "--budget", 2, "--patch-px", 32,
        "--iterations", 1, "--set", "lr_patch_px=8", "--set", "batch_size=1", "--set", "arch_kwargs={feat=4, blocks=1}",
        "--device", "cpu", "--json", "--home", tmp_path / "home",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["images"] == images


def test_train_sr_on_crops_of_a_wrong_size_is_one_message(tmp_path: Path):
    folder, home = photos(tmp_path / "photos"), tmp_path / "home"
    result = ddsr("train-sr", "--data", folder, "--source", "threshold", "--patch-px", 30, "--home", home)
    assert_failed(result, "patch_px", "multiple of 4")


def small_weights(folder: Path) -> Path:
    kwargs = {"feat": 8, "blocks": 1}
    save_weights(folder, build_network("edsr-small", kwargs), "edsr-small", kwargs, 4, {})
    torch.save({"note": torch.zeros(1)}, folder / "other.pth")
    return folder


@pytest.mark.parametrize("name", ["", "weights.pth", "weights.safetensors"])
def test_export_sr_writes_onnx_and_says_how_near_it_is(tmp_path: Path, name: str):
    result = ddsr("export-sr", small_weights(tmp_path / "w") / name, tmp_path / "new/x4.onnx", "--home", tmp_path / "home")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "new/x4.onnx").is_file()
    assert "edsr-small x4" in result.output
    differences = [float(line.split()[-1]) for line in result.output.splitlines() if "largest difference" in line]
    assert len(differences) == 2
    assert max(differences) < 1e-5


def test_export_sr_of_what_is_not_there_or_not_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DDSR_HOME", str(tmp_path / "home"))
    weights = small_weights(tmp_path / "w")
    assert_failed(ddsr("export-sr", tmp_path / "none", tmp_path / "x.onnx"), "no weights file", "none")
    assert_failed(ddsr("export-sr", weights / "other.pth", tmp_path / "x.onnx"), "unknown network", "other.pth")
    assert_failed(ddsr("export-sr", weights, tmp_path / "x.pth"), ".pth is not a format", "weights.pth")
    (tmp_path / "x.onnx").write_text("mine")
    assert_failed(ddsr("export-sr", weights, tmp_path / "x.onnx"), "already exists")
    assert (tmp_path / "x.onnx").read_text() == "mine"


def test_crops_shrink_to_small_images_and_the_command_says_so(tmp_path: Path):
    folder, home = photos(tmp_path / "photos", side=64), tmp_path / "home"
    tiny = ("--iterations", 1, "--set", "batch_size=1", "--set", "arch_kwargs={feat=4, blocks=1}", "--home", home)
    result = ddsr("train-sr", "--data", folder, *tiny)
    assert result.exit_code == 0, result.output
    assert "LR crops of 16 px: the images are smaller than the published 24 px" in result.stderr
    summary = next(home.glob("artifacts/train_sr/*/summary.json"))
    assert json.loads(summary.read_text())["lr_patch_px"] == 16
