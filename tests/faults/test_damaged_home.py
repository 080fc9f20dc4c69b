"""A home in which one byte of one file is flipped, read through every command.

The property: a command that needs the file ends with one message that names what is damaged; any other command, and one for
which the file only is a note, prints what it printed before. Never a traceback, never another result.

One file of each kind by default; DDSR_FLIPS sets how many bytes are flipped in each.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from ddsr_core.nightly.night import Night, run_night
from ddsr_core.pipeline.config import load_config
from ddsr_core.pipeline.plain import plain_backend
from ddsr_core.pipeline.request import Execution, RunRequest
from ddsr_core.pipeline.run import run_plainly
from ddsr_core.pipeline.run_folder import read_run
from ddsr_core.pipeline.step_runs import TrainRequest, run_training
from ddsr_core.storage.store import Store
from flows.cli.main import cli
from tests.helpers.cli import ddsr
from tests.helpers.commands import TINY, make_photos

FLIPS = int(os.environ.get("DDSR_FLIPS", "1"))
SEED = int(os.environ.get("DDSR_MUTATION_SEED", "0"))
#: Commands that read no artifact of a home (serve: published reports): what they do is covered by other tests.
BEGIN_OR_SET_UP = {"demo", "distill", "reproduce", "nightly", "plan", "bench", "doctor", "pretrain", "deploy", "notify",
                   "config", "fields", "serve"}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a home that has a run, a network of its own and a night, and with the photos."""
    root = tmp_path_factory.mktemp("whole")
    photos, tests = make_photos(root / "photos", 4), make_photos(root / "tests", 2, first=10)
    store = Store(root / "home")
    request = RunRequest(images=photos, test=tests, overrides=TINY, home=store.url, run="mine")
    run_plainly(request)
    config = load_config("demo", overrides=TINY)
    fields = {"name": "cats", "images": photos, "test": tests, "config": config, "metric": "psnr_y", "margin": 0.0,
              "warm": True, "warm_steps": 1, "execution": Execution(home=store.url)}  # fmt: skip
    run_night(Night(**fields), store, plain_backend(request, store))
    training = TrainRequest(data=photos, iterations=2, overrides=("lr_patch_px=8", "batch_size=1"), home=store.url)
    run_training(training, store, plain_backend(training, store))
    shutil.copyfile(photos / "0.png", root / "query.png")
    make_photos(root / "small", 1, first=20)
    return root


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def folder_of(root: Path, stage: str) -> Path:
    """The last artifact of a stage of the run; for SR networks, that of the one trained on the distilled set."""
    stages = read_run(Store(root / "home"), "mine")["stages"]
    return root / "home" / next(item["path"] for item in reversed(stages) if item["name"].split(" ")[0] == stage)


#: Command -> its arguments, and the stages whose artifacts it reads.
Reader = tuple[Callable[[Path], list[object]], set[str]]
REPORTED = {"patches", "embeddings", "clusters", "latents", "finetune", "train_sr", "sample", "evaluate"}
READERS: dict[str, Reader] = {
    "report": (lambda root: ["report", "mine"], REPORTED),
    "search": (lambda root: ["search", "--image", root / "query.png", "--run", "mine", "--json"],
               {"patches", "embeddings", "clusters"}),
    "export": (lambda root: ["export", "mine", "--out", root / "model", "--json"], {"finetune"}),
    "export a folder": (lambda root: ["export", folder_of(root, "finetune"), "--base", "ddsr-tiny", "--out", root / "model"],
                        {"finetune"}),
    "push": (lambda root: ["push", "mine", "me/set", "--dry-run", "--json"], REPORTED),
    "push a network": (lambda root: ["push", "mine", "me/net", "--network", "edsr-small/distilled", "--dry-run", "--json"],
                       REPORTED),
    "upscale by name": (lambda root: ["upscale", root / "small", root / "big", "--weights", "mine:edsr-small/distilled"],
                        {"train_sr"}),
    "upscale by folder": (lambda root: ["upscale", root / "small", root / "big", "--weights", folder_of(root, "train_sr")],
                          {"train_sr"}),
    "upscale by file": (lambda root: ["upscale", root / "small", root / "big", "--weights",
                                      folder_of(root, "train_sr") / "weights.safetensors"], {"train_sr"}),
    "upscale an artifact": (lambda root: ["upscale", folder_of(root, "sample"), root / "big", "--weights",
                                          root / "home/runs/mine/networks/edsr-small-distilled.safetensors"], {"sample"}),
    "export-sr": (lambda root: ["export-sr", folder_of(root, "train_sr"), root / "x4.onnx"], {"train_sr"}),
    "evaluate by name": (lambda root: ["evaluate", "--weights", "mine:edsr-small/distilled", "--test", root / "tests",
                                       "--no-lpips", "--run", "e"], {"train_sr"}),
    "evaluate by folder": (lambda root: ["evaluate", "--weights", folder_of(root, "train_sr"), "--test", root / "tests",
                                         "--no-lpips", "--run", "e"], {"train_sr"}),
    "evaluate on an artifact": (lambda root: ["evaluate", "--weights", "bicubic", "--test", folder_of(root, "sample"),
                                              "--no-lpips", "--run", "e"], {"sample"}),
    "train-sr": (lambda root: ["train-sr", "--data", folder_of(root, "patches"), "--iterations", 1, "--run", "t",
                               "--set", "lr_patch_px=8"], {"patches"}),
    "train-sr from weights": (lambda root: ["train-sr", "--data", root / "photos", "--init", folder_of(root, "train_sr"),
                                            "--iterations", 1, "--run", "t", "--set", "lr_patch_px=8"], {"train_sr"}),
    "rollback": (lambda root: ["rollback", 1, "--name", "cats"], {"sample"}),
    "runs": (lambda root: ["runs", "--json"], set()),
    "show": (lambda root: ["show", "mine", "--json"], set()),
    "versions": (lambda root: ["versions", "--name", "cats", "--json"], set()),
    "gc": (lambda root: ["gc", "--json"], set()),
}  # fmt: skip


def run_reader(name: str, root: Path) -> Result:
    return ddsr(*READERS[name][0](root), "--home", root / "home")


def flipped(path: Path, rng: np.random.Generator) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(rng.integers(0, len(data)))] ^= 1 << int(rng.integers(0, 8))
    path.write_bytes(data)


def assert_one_message(result: Result, what: str) -> None:
    assert result.exit_code == 1, f"{what}: {result.exit_code}, {result.output}, {result.exception!r}"
    assert result.exception is None or isinstance(result.exception, SystemExit), f"{what}: {result.exception!r}"
    assert "Traceback" not in result.output, what
    assert result.output.count("  where: ") == 1, f"{what}: {result.output}"


def test_every_command_reads_nothing_or_is_a_reader() -> None:
    covered = {name.split(" ")[0] for name in READERS}
    assert covered | BEGIN_OR_SET_UP == set(cli.commands)
    assert not covered & BEGIN_OR_SET_UP


@pytest.mark.parametrize("name", READERS)
def test_a_whole_home_is_read(copy: Path, name: str) -> None:
    result = run_reader(name, copy)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("name", "stage"), [(name, stage) for name, (_, stages) in READERS.items() for stage in sorted(stages)]
)
def test_no_command_reads_a_damaged_artifact(copy: Path, name: str, stage: str) -> None:
    """One file of the artifact, another one for each reader; with DDSR_FLIPS more of them."""
    folder = folder_of(copy, stage)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    rng = np.random.default_rng([SEED, list(READERS).index(name), sorted(REPORTED).index(stage)])
    for path in rng.choice(files, min(FLIPS, len(files)), replace=False):
        before = path.read_bytes()
        flipped(path, rng)
        result = run_reader(name, copy)
        assert_one_message(result, f"{name}: {path.relative_to(folder)}")
        assert "damaged" in result.output
        path.write_bytes(before)


def records(home: Path) -> Iterator[Path]:
    """Every file outside the artifacts, one of each kind."""
    kinds: set[str] = set()
    for path in sorted(home.rglob("*")):
        place = path.relative_to(home).as_posix()
        kind = re.sub(r"[0-9a-f]{16,}|\d+", "0", place)
        if path.is_file() and path.stat().st_size and not place.startswith("artifacts/") and kind not in kinds:
            kinds.add(kind)
            yield path


QUICK = ("runs", "show", "versions", "gc")
#: With these for what they read; with DDSR_FLIPS, for every file.
SLOW = ("rollback", "upscale by name", "search", "report")
READ_BY_SLOW = ("runs/mine/run.json", "runs/mine/config.toml", "nightly/cats/registry.json")


def without_times(result: Result) -> str:
    return re.sub(r"[^ ]*/copy/", "", result.stdout)


def test_a_damaged_record_is_one_message_and_never_another_result(copy: Path) -> None:
    home = copy / "home"
    shutil.copytree(home, copy / "kept")
    undisturbed = {name: without_times(run_reader(name, copy)) for name in QUICK + SLOW}
    told: dict[str, set[str]] = {}
    for number, path in enumerate(records(copy / "kept")):
        place = path.relative_to(copy / "kept")
        names = QUICK + SLOW if FLIPS > 1 or place.as_posix() in READ_BY_SLOW else QUICK
        for flip in range(FLIPS):
            for name in names:
                shutil.rmtree(home)
                shutil.rmtree(copy / "big", ignore_errors=True)
                shutil.copytree(copy / "kept", home)
                flipped(home / place, np.random.default_rng([SEED, number, flip]))
                result = run_reader(name, copy)
                if result.exit_code == 0 and name == "runs":
                    same = [state for state in json.loads(result.stdout) if state["status"] != "damaged"]
                    assert all(state in json.loads(undisturbed[name]) for state in same), place
                    continue
                if result.exit_code == 0:
                    assert without_times(result) == undisturbed[name], f"{name}: {place}"
                else:
                    assert_one_message(result, f"{name}: {place}")
                    told.setdefault(place.as_posix(), set()).add(name)
    assert told == {
        "nightly/cats/registry.json": {"versions", "gc", "rollback"},
        "runs/mine/run.json": {"show", "gc", "search", "report", "upscale by name"},
        "runs/mine/config.toml": {"report"},
        "runs/cats-0001/run.json": {"gc"},
        "runs/edsr-small-photos/run.json": {"gc"},
    }
