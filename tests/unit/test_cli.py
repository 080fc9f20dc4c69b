"""The command line: exit codes, one message for bad input, help with an example."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from ddsr_core.images import save_png
from flows.cli import cli


def ddsr(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def photos(folder: Path, count: int = 3, side: int = 96) -> Path:
    for seed in range(count):
        image = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
        save_png(folder / f"{seed}.png", image)
    return folder


def assert_failed(result: Result, *texts: str) -> None:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    for text in texts:
        assert text in result.output


@pytest.mark.parametrize("command", list(cli.commands))
def test_help_has_an_example(command: str):
    result = ddsr(command, "--help")
    assert result.exit_code == 0
    assert "Example: ddsr" in result.output


def test_wrong_usage_is_2():
    assert ddsr("distill").exit_code == 2
    assert ddsr("dance").exit_code == 2
    assert ddsr("train-sr", "--data", "x", "--budget", "0").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--preset", "demoo"], ["no preset 'demoo'", "demo"]),
        (["--set", "finetune.stpes=3"], ["unknown field", "did you mean steps?"]),
        (["--set", "sr.archs=['edsr-smal']"], ["edsr-smal"]),
        (["--run", "../elsewhere"], ["cannot be the name of a run"]),
        (["--config", "no-such-file.toml"], ["no-such-file.toml"]),
    ],
)
def test_bad_options_are_one_message(tmp_path: Path, arguments: list[str], texts: list[str]):
    folder = photos(tmp_path / "photos")
    home = tmp_path / "home"
    result = ddsr("distill", "--images", folder, "--home", home, "--no-prefect", *arguments)
    assert_failed(result, *texts)


def test_empty_and_missing_folders_are_one_message(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    home = ["--home", tmp_path / "home", "--no-prefect", "--set", "sr.archs=[]"]
    assert_failed(ddsr("distill", "--images", tmp_path / "empty", *home), "no images found", "empty")
    assert_failed(ddsr("distill", "--images", tmp_path / "nowhere", *home), "no such folder", "nowhere")


def test_a_single_photo_cannot_be_split(tmp_path: Path):
    result = ddsr("distill", "--images", photos(tmp_path / "p", 1), "--home", tmp_path / "home", "--no-prefect")
    assert_failed(result, "single photo", "--test")


def test_a_missing_base_model_is_named_before_any_work(tmp_path: Path):
    folder = photos(tmp_path / "photos")
    result = ddsr("distill", "--images", folder, "--home", tmp_path / "home", "--no-prefect", "--set", "base=/no/base")
    assert_failed(result, "/no/base", "ddsr-tiny")
    assert not (tmp_path / "home/artifacts").exists()


def test_more_clusters_than_patches_is_said(tmp_path: Path):
    folder = photos(tmp_path / "photos", 2, 64)
    result = ddsr(
        "distill", "--images", folder, "--home", tmp_path / "home", "--no-prefect", "--set", "sr.archs=[]",
    )  # fmt: skip
    assert_failed(result, "clusters")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_home_is_one_message(tmp_path: Path):
    (tmp_path / "locked").mkdir(mode=0o500)
    result = ddsr("distill", "--images", photos(tmp_path / "p"), "--home", tmp_path / "locked/home", "--no-prefect")
    assert_failed(result, "cannot write", "--home")


def test_a_home_that_is_a_file_is_one_message(tmp_path: Path):
    (tmp_path / "home").write_text("")
    result = ddsr("distill", "--images", photos(tmp_path / "p"), "--home", tmp_path / "home", "--no-prefect")
    assert_failed(result, "cannot write", "--home")


def test_runs_show_and_gc_on_an_empty_home(tmp_path: Path):
    assert "no runs" in ddsr("runs", "--home", tmp_path).output
    assert_failed(ddsr("show", "demo", "--home", tmp_path), "no run 'demo'")
    assert ddsr("gc", "--home", tmp_path).exit_code == 0


def test_gc_removes_what_no_run_uses_and_only_when_told(tmp_path: Path):
    left = tmp_path / "artifacts/patches/abc.partial"
    left.mkdir(parents=True)
    (left / "x").write_bytes(b"1234")
    assert "would remove" in ddsr("gc", "--home", tmp_path).output
    assert left.exists()
    assert ddsr("gc", "--delete", "--home", tmp_path).exit_code == 0
    assert not left.exists()


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
    import torch

    from ddsr_core.sr.architectures import build_network
    from ddsr_core.sr.weights import save_weights

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
    from ddsr_core.sr.architectures import build_network
    from ddsr_core.sr.weights import save_weights

    kwargs = {"feat": 8, "blocks": 1}
    save_weights(tmp_path / "w", build_network("edsr-small", kwargs), "edsr-small", kwargs, 4, {})
    folder = photos(tmp_path / "p", 1)
    done = ddsr("upscale", folder, tmp_path / "big", "--weights", tmp_path / "w", "--device", "cpu")
    assert "edsr-small x4: 1 written, 0 skipped" in done.output
    refused = ddsr("upscale", folder, tmp_path / "more", "--weights", tmp_path / "w", "--scale", 2)
    assert_failed(refused, "the weights enlarge x4, not x2")


def test_unknown_weights_are_one_message(tmp_path: Path):
    (tmp_path / "w.pth").write_bytes(b"not weights")
    folder = photos(tmp_path / "p", 1)
    for weights in (tmp_path / "w.pth", tmp_path / "none.pth"):
        assert_failed(ddsr("evaluate", "--weights", weights, "--test", folder, "--home", tmp_path / "home"), weights.name)
