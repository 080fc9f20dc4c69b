"""The flow on a real ephemeral Prefect server: caching, damage, and the same keys as without Prefect."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from ddsr_core.images import save_png

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "patches.patch_px=64", "patches.stride_px=32", "clusters.k=2", "embeddings.image_px=32", "finetune.steps=2",
    "finetune.batch_size=2", "sample.count=2", "sample.oversample=1", "sample.steps=2", "sr.archs=['edsr-small']",
    "sr.sources=['distilled']", "sr.train.iterations=2", "sr.train.batch_size=2", "evaluate.lpips=false",
)  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(4):
        noise = np.random.default_rng(seed).integers(0, 256, (160, 160, 3), dtype=np.uint8)
        save_png(folder / f"{seed}.png", cv2.GaussianBlur(noise, (0, 0), 1 + 0.3 * seed))
    return folder


def distill(photos: Path, home: Path, *more: str) -> dict[str, object]:
    """Run the command in a process of its own, as a user does; its JSON."""
    command = [
        sys.executable,
        "-m",
        "flows.cli",
        "distill",
        "--images",
        str(photos),
        "--home",
        str(home),
        "--json",
        *more,
    ]
    for text in TINY:
        command += ["--set", text]
    environment = {**os.environ, "PREFECT_HOME": str(home.parent / "prefect"), "OMP_NUM_THREADS": "1"}
    environment.pop("PREFECT_API_URL", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_cached_rebuilt_and_equal_without_prefect(photos: Path, tmp_path: Path):
    first = distill(photos, tmp_path / "home")
    stages = {row["stage"]: row for row in first["stages"]}
    assert not any(row["cached"] for row in stages.values())
    assert (Path(first["folder"]) / "report.json").is_file()

    again = distill(photos, tmp_path / "home")
    assert all(row["cached"] for row in again["stages"])

    damaged = next((tmp_path / "home/artifacts/sample").glob("*/images/000000.png"))
    damaged.unlink()
    rebuilt = {row["stage"]: row["cached"] for row in distill(photos, tmp_path / "home")["stages"]}
    assert [name for name, cached in rebuilt.items() if not cached] == ["sample"]

    plain = distill(photos, tmp_path / "plain", "--no-prefect")
    assert [row["key"] for row in plain["stages"]] == [row["key"] for row in first["stages"]]
    assert digests(tmp_path / "plain") == digests(tmp_path / "home")


def digests(home: Path) -> dict[str, str]:
    manifests = (json.loads(path.read_text()) for path in home.glob("artifacts/*/*/manifest.json"))
    return {manifest["key"]: manifest["digest"] for manifest in manifests}
