"""The command line: exit codes, one message for bad input, help with an example."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete

from ddsr_core.storage.store import Store
from flows.cli import main
from flows.cli.main import cli
from tests.helpers.cli import assert_failed, ddsr, photos
from tests.helpers.commands import ROOT

MINE = set(cli.commands) - {"train-sr", "evaluate", "upscale", "export-sr"}


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
