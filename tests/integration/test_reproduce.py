"""The command ``ddsr reproduce`` in miniature: every cell is there, and nothing is built twice."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

from ddsr_core.images import read_rgb
from tests.integration.commands import ROOT, TINY, make_photos


def reproduce(photos: Path, home: Path, experiment: str = "ablation", *more: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "flows.cli", "reproduce", experiment, "--images", str(photos), "--test", str(photos),
        "--home", str(home), "--seeds", "1", "--no-prefect", *more,
    ]  # fmt: skip
    for text in TINY:
        if not text.startswith("sample.oversample"):
            command += ["--set", text]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def test_every_variant_and_seed_is_measured_and_a_second_run_builds_nothing(tmp_path: Path):
    photos = make_photos(tmp_path / "photos", count=3)
    first = reproduce(photos, tmp_path / "home")
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "home/runs/ablation"
    rows = list(csv.DictReader((folder / "ablation.csv").open(newline="")))
    names = ["base", "difffit", "minimax", "lsr-paper", "lsr-target", "select", "random", "threshold", "full"]
    assert [(row["variant"], row["seed"]) for row in rows] == [(name, seed) for seed in "0" for name in names]
    table = (folder / "ablation.md").read_text()
    assert table in first.stdout
    command = table.split("`")[1]  # whole: it can be run again
    assert command.startswith("ddsr reproduce ablation --images ")
    assert f"--test {photos}" in command
    assert "--set sample.count=2" in command
    assert "--no-prefect" in command
    assert "edsr-small (2 iterations at batch 2), 1 seed." in table
    sheets = {path.name for path in folder.glob("sheet-*.png")}
    assert sheets == {f"sheet-{name}.png" for name in names if name != "full"}
    assert read_rgb(folder / "sheet-base.png").shape == (64, 130, 3)  # two images side by side
    assert len(json.loads((folder / "ablation.json").read_text())["cells"]) == len(names)
    assert json.loads((folder / "run.json").read_text())["status"] == "completed"
    builds = len(list((tmp_path / "home/artifacts").glob("*/*/manifest.json")))
    made = {path.stat().st_mtime_ns for path in (tmp_path / "home/artifacts").glob("*/*/manifest.json")}
    second = reproduce(photos, tmp_path / "home")
    assert second.returncode == 0, second.stderr
    assert {path.stat().st_mtime_ns for path in (tmp_path / "home/artifacts").glob("*/*/manifest.json")} == made
    adapters = len(list((tmp_path / "home/artifacts/finetune").glob("*/manifest.json")))
    assert adapters == 5  # lsr-target and select share theirs
    assert builds > 20


def test_a_table_is_filled_by_two_workers_as_by_one(tmp_path: Path):
    photos = make_photos(tmp_path / "photos", count=3)
    first = reproduce(photos, tmp_path / "home", "table2", "--workers", "2")
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "home/runs/table2"
    rows = list(csv.DictReader((folder / "table2.csv").open(newline="")))
    sets = [(source, count) for source in ("distilled", "threshold", "random") for count in ("7", "28", "70")]
    sets += [("full", ""), ("full-thresholded", "")]
    assert {(row["network"], row["variant"], row["images"]) for row in rows} == {
        (network, *pair) for network in ("EDSR", "SRFormer") for pair in sets
    }
    assert len(rows) == 22
    table = (folder / "table2.md").read_text()
    assert "| training set | 7 | 28 | 70 | all |" in table
    assert {path.name for path in folder.glob("*.svg")} == {f"table2-{m}.svg" for m in ("psnr_y", "psnr_rgb", "ssim_y")}
    made = {path.stat().st_mtime_ns for path in (tmp_path / "home/artifacts").glob("*/*/manifest.json")}
    second = reproduce(photos, tmp_path / "home", "table2")
    assert second.returncode == 0, second.stderr
    assert {path.stat().st_mtime_ns for path in (tmp_path / "home/artifacts").glob("*/*/manifest.json")} == made
    again = (folder / "table2.md").read_text()
    assert again.replace("--workers 1", "--workers 2") == table
