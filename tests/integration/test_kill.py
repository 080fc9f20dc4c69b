"""kill -9 in the middle of stages, the same command again: the digests of an undisturbed run."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.commands import digests, distill, make_photos, start

pytestmark = pytest.mark.slow
SETTINGS = (
    "--no-prefect", "--set", "finetune.steps=12", "--set", "finetune.checkpoint_every=2", "--set", "sample.count=8",
    "--set", "sample.batch_size=2", "--set", "sr.train.iterations=30", "--set", "sr.train.checkpoint_every=5",
)  # fmt: skip
#: What must have appeared in the stage's partial folder before the kill.
MOMENTS = (
    ("patches", "resume/scores/*.json"),
    ("finetune", "resume/checkpoint.pt"),
    ("sample", "resume/candidates/*.png"),
    ("train_sr", "resume/checkpoint.pt"),
)


def kill_when(process: subprocess.Popen[str], home: Path, stage: str, pattern: str) -> bool:
    """SIGKILL once the stage's partial folder holds ``pattern``; False if the process ended before that."""
    while process.poll() is None:
        if any(home.glob(f"artifacts/{stage}/*.partial/{pattern}")):
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)
    return False


def test_killed_in_four_stages_ends_with_the_digests_of_an_undisturbed_run(tmp_path: Path):
    photos = make_photos(tmp_path / "photos")
    distill(photos, tmp_path / "whole", *SETTINGS)
    home = tmp_path / "killed"
    killed = [stage for stage, pattern in MOMENTS if kill_when(start(photos, home, *SETTINGS), home, stage, pattern)]
    assert killed == [stage for stage, _ in MOMENTS]
    assert not any(home.glob("runs/*/report.json"))
    distill(photos, home, *SETTINGS)
    assert digests(home) == digests(tmp_path / "whole")
