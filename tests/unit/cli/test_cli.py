"""The command line: exit codes, one message for bad input, help with an example."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

from ddsr_core.baselines.names import TRAINING_SETS
from ddsr_core.config import Runtime
from ddsr_core.imaging.images import save_png
from ddsr_core.storage.store import Store
from flows.cli import main
from flows.cli.main import cli
from tests.helpers.commands import ROOT
from tests.helpers.toy_stage import TOY, CountConfig, inputs

MINE = set(cli.commands) - {"train-sr", "evaluate", "upscale", "export-sr"}


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
    unknown = ddsr("distill", "--images", "x", "--preset", "demoo")
    assert unknown.exit_code == 2
    assert "is not one of 'demo', 'best', 'paper', 'released'" in unknown.output


def test_help_names_every_command_once_in_a_section_and_cuts_no_line():
    text = ddsr("--help").output
    for name, command in cli.commands.items():
        line = command.get_short_help_str(200)
        assert len(line) <= 60
        assert f"\n  {name}" in text
        assert line in text
    heads = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert heads == ["Options:", *(f"{section.title}:" for section in cli.sections)]
    assert {"Distillation:", "SR networks:", "Nightly distillation:", "Results:", "Settings:", "Set-up:"} < set(heads)


@pytest.mark.parametrize("words", [["--help"], ["runs", "--home", "nowhere"], ["distill", "--help"]])
def test_quick_commands_import_nothing_heavy(words: list[str]):
    program = (
        "import sys\nfrom click.testing import CliRunner\nfrom flows.cli.main import cli\n"
        f"assert CliRunner().invoke(cli, {words!r}).exit_code == 0\n"
        "print(sorted({'torch', 'numpy', 'pyarrow', 'prefect', 'diffusers', 'sklearn', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_option_has_a_help_text_that_is_a_sentence():
    for name, command in cli.commands.items():
        for parameter in command.params:
            if isinstance(parameter, click.Option) and name in MINE:
                text = (parameter.help or "").split("  [")[0].split("\n")[0].strip()
                assert text[:1].isupper() or text.split(":")[0] in str(parameter.type), (name, parameter.name)
                assert text.endswith("."), (name, parameter.name)


def test_every_command_prints_json_when_asked():
    for name, command in cli.commands.items():
        assert any("--json" in parameter.opts for parameter in command.params), name


def test_runs_have_a_head_and_tell_interrupted_and_cancelled_from_failed(tmp_path: Path):
    store = Store(tmp_path)
    here = {"preset": "demo", "host": socket.gethostname(), "started": "2026-01-02T03:04:05+00:00"}
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    stages = [
        {"name": "patches", "counts": {"photos": 6}},
        {"name": "evaluate (bicubic)", "counts": {"metrics": {"psnr_y": 30.0}}},
        {"name": "evaluate (edsr random)", "counts": {"metrics": {"psnr_y": 25.5}}},
        {"name": "evaluate (edsr distilled)", "counts": {"metrics": {"psnr_y": 26.251}}},
    ]
    states = [
        {"name": "alive", "status": "running", "pid": os.getpid()},
        {"name": "dead", "status": "running", "pid": ended.pid},
        {"name": "elsewhere", "status": "running", "pid": ended.pid, "host": "another"},
        {"name": "stopped", "status": "cancelled"},
        {"name": "done", "status": "completed", "finished": "2026-01-02T04:04:10+00:00", "stages": stages},
    ]
    for state in states:
        store.write_file(f"runs/{state['name']}/run.json", json.dumps({**here, **state}).encode())
    head, *rows = [line.split() for line in ddsr("runs", "--home", tmp_path).output.splitlines()]
    assert head[:3] == ["run", "status", "preset"]
    assert {row[0]: row[1] for row in rows} == {
        "alive": "running", "dead": "interrupted", "elsewhere": "running", "stopped": "cancelled", "done": "completed",
    }  # fmt: skip
    done = next(row for row in rows if row[0] == "done")
    assert done[3:6] == ["6", "26.25", "dB"]
    assert done[-1] == "1:00:05"
    listed = json.loads(ddsr("runs", "--json", "--home", tmp_path).output)
    assert {state["name"]: state["status"] for state in listed}["dead"] == "interrupted"


def test_a_config_is_printed_and_read_again_as_toml_and_as_yaml(tmp_path: Path):
    (tmp_path / "a.toml").write_text(ddsr("config", "--preset", "best", "--set", "sample.count=9").output)
    assert ddsr("config", "--config", tmp_path / "a.toml").output == (tmp_path / "a.toml").read_text()
    (tmp_path / "b.yaml").write_text("vae: null\nsample:\n  count: 9\n")
    values = json.loads(ddsr("config", "--preset", "best", "--config", tmp_path / "b.yaml", "--json").output)
    assert (values["sample"]["count"], values["vae"], values["base"]) == (9, None, "facebook/DiT-XL-2-512")
    (tmp_path / "c.yaml").write_text("sample: [")
    assert_failed(ddsr("config", "--config", tmp_path / "c.yaml"), "not YAML", "c.yaml")
    (tmp_path / "d.yml").write_text("- 1\n")
    assert_failed(ddsr("config", "--config", tmp_path / "d.yml"), "has no fields")


def test_fields_say_type_range_values_and_when_to_change_them():
    text = ddsr("fields", "sample").output
    assert "sample.count  (int, at least 1, at most 100000)\n    Images in the distilled set.\n" in text
    assert "demo: 70" in text
    assert "sample:" in ddsr("fields").output
    rows = json.loads(ddsr("fields", "sr.train", "--json").output)
    assert {row["name"] for row in rows} >= {"sr.train.iterations", "sr.train.learning_rate"}
    assert all(row["description"] for row in json.loads(ddsr("fields", "--json").output))
    assert_failed(ddsr("fields", "smaple"), "no settings 'smaple'", "sample")


@pytest.mark.parametrize(
    ("environment", "words", "plain"),
    [
        ({}, [], True), ({}, ["--prefect"], False), ({"PREFECT_API_URL": "http://x/api"}, [], False),
        ({"PREFECT_API_URL": "http://x/api"}, ["--no-prefect"], True),
    ],
)  # fmt: skip
def test_a_run_is_plain_unless_a_server_is_set_up_or_prefect_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: list[str], plain: bool
):
    for name in ("PREFECT_API_URL", "PREFECT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    given: dict[str, Any] = {}
    monkeypatch.setattr(main, "run_pipeline", lambda **options: given.update(options))
    assert ddsr("distill", "--images", "x", *words).exit_code == 0
    assert given["no_prefect"] is plain


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("show c", ["cats"]), ("distill --preset re", ["released"]), ("reproduce ab", ["ablation"]),
        ("upscale a b --weights cats:", ["cats:edsr/full"]),
    ],
)  # fmt: skip
def test_the_shell_completes_runs_networks_presets_and_experiments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, found: list[str]
):
    state = {"name": "cats", "status": "completed", "sr": [{"arch": "edsr", "source": "full"}]}
    Store(tmp_path).write_file("runs/cats/run.json", json.dumps(state).encode())
    Store(tmp_path).write_file("runs/dogs/run.json", json.dumps({"name": "dogs", "status": "failed"}).encode())
    monkeypatch.setenv("DDSR_HOME", str(tmp_path))
    *given, incomplete = words.split()
    items = ShellComplete(cli, {}, "ddsr", "_DDSR_COMPLETE").get_completions(given, incomplete)
    assert [item.value for item in items if item.type == "plain"] == found


def test_the_old_name_of_the_protocol_is_accepted():
    [option] = [p for p in cli.commands["reproduce"].params if p.name == "protocol"]
    assert option.opts == ["--protocol", "--scale"]


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
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
    assert_failed(ddsr("distill", "--images", tmp_path / "empty", *home), "no photos found", "empty")
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


def unused_artifact(home: Path) -> Path:
    """An artifact and a partial build that no run names, in a home; returns the artifact's folder."""
    log = home.parent / "log"
    log.touch()
    store = Store(home)
    artifact, _ = store.build(TOY, CountConfig(files=2), inputs(log), Runtime())
    partial = artifact.path.with_name("0" * 32 + ".partial")
    partial.mkdir()
    partial.with_name("0" * 32 + ".lock").touch()
    return artifact.path


def test_gc_removes_what_no_run_uses_and_only_when_told(tmp_path: Path):
    home = tmp_path / "home"
    folder = unused_artifact(home)
    listed = ddsr("gc", "--home", home).output
    assert "would remove toy, not finished, today (0.0 MB)\n    " in listed
    assert f"would remove toy, today (0.0 MB)\n    {folder}" in listed
    assert folder.exists()
    done = json.loads(ddsr("gc", "--delete", "--json", "--home", home).output)
    assert [Path(item["path"]).name for item in done["artifacts"]] == ["0" * 32 + ".partial", folder.name]
    assert [path.name for path in (home / "artifacts/toy").iterdir() if path.is_dir()] == []


def test_gc_refuses_a_folder_that_is_not_a_home(tmp_path: Path):
    album = tmp_path / "photos/artifacts/2024/holiday"
    album.mkdir(parents=True)
    (album / "beach.jpg").write_bytes(b"photo")
    assert_failed(ddsr("gc", "--delete", "--home", tmp_path / "photos"), "not a home of ddsr", "--home")
    assert (album / "beach.jpg").exists()


def test_gc_leaves_alone_what_ddsr_has_not_made(tmp_path: Path):
    home, outside = tmp_path / "home", tmp_path / "outside"
    folder = unused_artifact(home)
    shutil.copytree(folder, outside)
    (folder / "notes.txt").write_text("mine")
    (folder.parent / ("1" * 32)).symlink_to(outside)
    (home / "artifacts/linked").symlink_to(outside)
    (folder.parent / "holiday").mkdir()
    (folder.parent / ("2" * 32)).mkdir()
    (folder.parent / ("3" * 32 + ".partial")).mkdir()
    done = json.loads(ddsr("gc", "--delete", "--json", "--home", home).output)
    assert [Path(item["path"]).name for item in done["artifacts"]] == ["0" * 32 + ".partial"]
    reasons = {Path(path).name[:8]: reason for path, reason in done["left"].items()}
    assert reasons == {
        folder.name[:8]: "it contains a foreign file: notes.txt", "1" * 8: "it is a link",
        "holiday": "its name is not a key",
        "2" * 8: "its manifest is missing or damaged", "3" * 8: "it was not left by a build of ddsr",
    }  # fmt: skip
    assert (outside / "manifest.json").exists()


def test_gc_removes_nothing_while_the_record_of_a_run_cannot_be_read(tmp_path: Path):
    home = tmp_path / "home"
    folder = unused_artifact(home)
    Store(home).write_file("runs/cats/run.json", b"{")
    result = ddsr("gc", "--delete", "--home", home)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert folder.exists()


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

    from ddsr_core.sr.networks import build_network
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
    from ddsr_core.sr.networks import build_network
    from ddsr_core.sr.weights import save_weights

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
    import torch

    from ddsr_core.sr.networks import build_network
    from ddsr_core.sr.weights import save_weights

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
