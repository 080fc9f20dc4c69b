"""The command ``ddsr reproduce`` in miniature: every cell is there, and nothing is built twice."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.integration.commands import ROOT, TINY, make_photos


def reproduce(photos: Path, home: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "flows.cli", "reproduce", "ablation", "--images", str(photos), "--test", str(photos),
        "--home", str(home), "--seeds", "1", "--no-prefect",
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
    assert (folder / "ablation.md").read_text() in first.stdout
    assert json.loads((folder / "run.json").read_text())["status"] == "completed"
    builds = len(list((tmp_path / "home/artifacts").glob("*/*/manifest.json")))
    made = {path.stat().st_mtime_ns for path in (tmp_path / "home/artifacts").glob("*/*/manifest.json")}
    second = reproduce(photos, tmp_path / "home")
    assert second.returncode == 0, second.stderr
    assert {path.stat().st_mtime_ns for path in (tmp_path / "home/artifacts").glob("*/*/manifest.json")} == made
    adapters = len(list((tmp_path / "home/artifacts/finetune").glob("*/manifest.json")))
    assert adapters == 5  # lsr-target and select share theirs
    assert builds > 20
