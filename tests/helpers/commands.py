"""Runs of the real command in a process of its own, at sizes of seconds."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np

from ddsr_core.imaging.images import save_png

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "patches.patch_px=64", "patches.stride_px=32", "clusters.k=2", "embeddings.image_px=32", "finetune.steps=2",
    "finetune.batch_size=2", "sample.count=2", "sample.oversample=1", "sample.steps=2", "sample.detail_restoration=1",
    "teacher.arch=edsr-small", "teacher.iterations=2", "teacher.lr_patch_px=16", "sr.archs=['edsr-small']",
    "sr.training_sets=['distilled']", "sr.train.iterations=2", "sr.train.batch_size=2", "evaluate.lpips=false",
)  # fmt: skip


def make_photos(folder: Path, count: int = 4, first: int = 0) -> Path:
    """Photos that are called by their seeds, which count from ``first``: other seeds are other photos."""
    for number in range(count):
        noise = np.random.default_rng(first + number).integers(0, 256, (160, 160, 3), dtype=np.uint8)
        save_png(folder / f"{first + number}.png", cv2.GaussianBlur(noise, (0, 0), 1 + 0.3 * number))
    return folder


def start(photos: Path, home: Path, *more: str) -> subprocess.Popen[str]:
    """Start ``ddsr distill`` on photos, printing JSON."""
    command = [sys.executable, "-m", "flows.cli.main", "distill", "--images", str(photos), "--home", str(home), "--json"]
    for text in TINY:
        command += ["--set", text]
    environment = {**os.environ, "PREFECT_HOME": str(home.parent / "prefect"), "OMP_NUM_THREADS": "1"}
    environment.pop("PREFECT_API_URL", None)
    return subprocess.Popen(
        [*command, *more], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def distill(photos: Path, home: Path, *more: str) -> dict[str, object]:
    """Run the command to its end; its JSON."""
    process = start(photos, home, *more)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    return dict(json.loads(output))


def digests(home: Path) -> dict[str, str]:
    """Key -> digest of every whole artifact."""
    manifests = (json.loads(path.read_text()) for path in home.glob("artifacts/*/*/manifest.json"))
    return {manifest["key"]: manifest["digest"] for manifest in manifests}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
