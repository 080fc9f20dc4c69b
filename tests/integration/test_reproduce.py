"""The command ``ddsr reproduce`` in miniature: every cell is there, and nothing is built twice."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddsr_core.errors import InputError
from ddsr_core.experiments.design import Design, Network, Variant
from ddsr_core.experiments.run import finish, measure
from ddsr_core.gc import collect_garbage
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.pipeline.plain import plain_backend
from ddsr_core.pipeline.request import RunRequest
from ddsr_core.pipeline.run import open_run
from ddsr_core.storage.store import Store
from tests.helpers.commands import ROOT, TINY, make_photos


def reproduce(photos: Path, test: Path, home: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "flows.cli.main", "reproduce", "ablation", "--images", str(photos), "--test", str(test),
        "--home", str(home), "--seeds", "1", "--no-prefect",
    ]  # fmt: skip
    for text in TINY:
        if not text.startswith("sample.oversample"):
            command += ["--set", text]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def test_every_variant_and_seed_is_measured_and_a_second_run_builds_nothing(tmp_path: Path):
    photos = make_photos(tmp_path / "photos", count=4)
    test = make_photos(tmp_path / "test", count=2, first=10)
    shutil.copy(photos / "3.png", test / "copy.png")
    first = reproduce(photos, test, tmp_path / "home")
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "home/runs/ablation"
    rows = list(csv.DictReader((folder / "ablation.csv").open(newline="")))
    names = ["base", "difffit", "minimax", "lsr-paper", "lsr-target", "select", "restored", "random", "threshold",
             "random + restored", "threshold + restored", "full"]  # fmt: skip
    assert [(row["variant"], row["seed"]) for row in rows] == [(name, seed) for seed in "0" for name in names]
    table = (folder / "ablation.md").read_text()
    assert table in first.stdout
    command = table.split("`")[1]  # whole: it can be run again
    assert command.startswith("ddsr reproduce ablation --images ")
    assert f"--test {test}" in command
    assert "--set sample.count=2" in command
    assert "--no-prefect" in command
    left_out = "1 training photo is also a test photo and is left out of training"
    assert f"edsr-small (2 iterations at batch 2), 1 seed. {left_out}." in table
    assert first.stderr.count(f"{left_out}: 3.png") == 1
    assert json.loads((folder / "run.json").read_text())["left_out"] == 1
    sheets = {path.name for path in folder.glob("sheet-*.png")}
    assert sheets == {f"sheet-{name.replace(' + ', '-')}.png" for name in names if name != "full"}
    assert read_rgb(folder / "sheet-base.png").shape == (64, 130, 3)  # two images side by side
    assert len(json.loads((folder / "ablation.json").read_text())["cells"]) == len(names)
    assert json.loads((folder / "run.json").read_text())["status"] == "completed"
    builds = len(list((tmp_path / "home/artifacts").glob("*/*/manifest.json")))
    made = {path.stat().st_mtime_ns for path in (tmp_path / "home/artifacts").glob("*/*/manifest.json")}
    assert collect_garbage(Store(tmp_path / "home"), delete=True) == []  # an experiment names its stages
    second = reproduce(photos, test, tmp_path / "home")
    assert second.returncode == 0, second.stderr
    assert {path.stat().st_mtime_ns for path in (tmp_path / "home/artifacts").glob("*/*/manifest.json")} == made
    adapters = len(list((tmp_path / "home/artifacts/finetune").glob("*/manifest.json")))
    assert adapters == 5  # lsr-target, select and restored share theirs
    assert builds > 20


SMALL = Design(
    "small",
    tuple(Variant("distilled", "drawn", images=count) for count in (2, 3)),
    (
        *(Variant("random", "cut", source="random", images=count) for count in (2, 3)),
        Variant("gsdd", "inverted", {"gsdd": {"steps": 1}}, source="gsdd", images=2),
        Variant("full-thresholded", "all accepted patches", source="full-thresholded"),
    ),
    (Network("EDSR", "edsr-small"), Network("SRFormer", "srformer-small", {"arch_kwargs": {"embed": 8, "heads": [2, 2]}})),
    "images",
    title="A small table",
)
GENERATOR = ("gsdd_generator.arch=edsr-small", "gsdd_generator.iterations=1", "gsdd_generator.batch_size=2",
             "gsdd_generator.lr_patch_px=8", "gsdd_generator.gan=null")  # fmt: skip


def measured(design: Design, photos: Path, store: Store, workers: int, overrides: tuple[str, ...] = ()) -> str:
    """The tables of a design, with one seed."""
    test = make_photos(photos.parent / "test", 2, first=10)
    request = RunRequest(
        images=photos, test=test, overrides=(*TINY, *overrides), run=design.name, home=store.url, device="cpu",
        runner="processes" if workers > 1 else "sequential", workers=workers,
    )  # fmt: skip
    with open_run(request, store, plain_backend(request, store)) as run:
        done = measure(design, run, 1, "ddsr reproduce")
        finish(run, done)
    return done.markdown()


def test_a_table_is_filled_by_two_workers_as_by_one(tmp_path: Path):
    photos = make_photos(tmp_path / "photos", count=3)
    store = Store(tmp_path / "home")

    def table(workers: int) -> str:
        return measured(SMALL, photos, store, workers, GENERATOR)

    first = table(workers=2)
    folder = tmp_path / "home/runs/small"
    rows = list(csv.DictReader((folder / "small.csv").open(newline="")))
    sets = [
        ("distilled", "2"),
        ("distilled", "3"),
        ("random", "2"),
        ("random", "3"),
        ("gsdd", "2"),
        ("full-thresholded", ""),
    ]
    assert [(row["variant"], row["images"], row["network"]) for row in rows] == [
        (*pair, network) for pair in sets for network in ("EDSR", "SRFormer")
    ]
    assert (folder / "small.md").read_text() == first
    assert "| training set | 2 | 3 | all |" in first
    assert {path.name for path in folder.glob("*.svg")} == {"small-psnr_y.svg", "small-ssim_y.svg"}
    assert {path.name for path in folder.glob("sheet-*")} == {f"sheet-{name}-{n}.png" for name, n in sets if n}
    made = {path.stat().st_mtime_ns for path in store.home.glob("artifacts/*/*/manifest.json")}
    assert table(workers=1) == first
    assert {path.stat().st_mtime_ns for path in store.home.glob("artifacts/*/*/manifest.json")} == made


def test_what_goes_wrong_in_a_worker_is_the_commands_message(tmp_path: Path):
    photos = make_photos(tmp_path / "photos", count=3)
    too_large = Design("bad", SMALL.distilled[:1], (), (Network("EDSR", "edsr-small", {"lr_patch_px": 64}),), "images")
    with pytest.raises(InputError, match="nothing to train on") as caught:
        measured(too_large, photos, Store(tmp_path / "home"), workers=2)
    assert "lr_patch_px" in str(caught.value.fix)


def test_workers_end_with_the_command_that_started_them(tmp_path: Path):
    program = (
        "import os, sys, time\nfrom ddsr_core.pipeline.plain import spread_here\n"
        "def work(number):\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    list(spread_here('processes', 2)(work, [0, 1]))\n"
    )
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, tmp_path / "program.py"], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    limit = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < limit, "workers are still there a minute after the command was killed"
        time.sleep(0.2)
