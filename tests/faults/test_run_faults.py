"""A whole run on a failing disk: an error is one message, a crash loses nothing, and the next run ends with the same bytes.

Operations are counted over the whole run, from the photos to the report. A few of them fail by default; DDSR_RUN_FAULTS sets
how many, and DDSR_MUTATION_SEED which.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ddsr_core.errors import DdsrError
from ddsr_core.pipeline.request import RunRequest
from ddsr_core.pipeline.run import run_plainly
from ddsr_core.pipeline.run_folder import read_run
from ddsr_core.storage.store import Store
from tests.faults.filesystem import CRASHED, ERRORS, Faults, crash, failing, raising
from tests.helpers.commands import ROOT, TINY, digests, make_photos

POINTS = int(os.environ.get("DDSR_RUN_FAULTS", "3"))
SEED = int(os.environ.get("DDSR_MUTATION_SEED", "0"))


def request_for(root: Path, home: Path) -> RunRequest:
    return RunRequest(images=root / "photos", test=root / "tests", overrides=TINY, home=str(home), run="mine")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The same sums in this process and in the one that crashes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of the photos and of a whole run, and the operations that this run took."""
    root = tmp_path_factory.mktemp("faults")
    make_photos(root / "photos", 4)
    make_photos(root / "tests", 2, first=10)
    with failing(Faults(root / "home")) as faults:
        run_plainly(request_for(root, root / "home"))
    return root, faults.names


def points(names: list[str], count: int) -> list[int]:
    """Operations that fail, as numbers from 1: ``count`` places all over the run."""
    return sorted(1 + np.random.default_rng(SEED).permutation(len(names))[:count])


def check_the_next_run(root: Path, home: Path, what: str) -> None:
    run_plainly(request_for(root, home))
    assert digests(home) == digests(root / "home"), what
    assert read_run(Store(home), "mine")["status"] == "completed", what
    assert (home / "runs/mine/report.html").exists(), what


def test_an_error_anywhere_in_a_run_is_one_message_and_the_next_run_is_right(
    undisturbed: tuple[Path, list[str]], tmp_path: Path
) -> None:
    root, names = undisturbed
    for turn, at in enumerate(points(names, POINTS)):
        number, home = ERRORS[turn % len(ERRORS)], tmp_path / str(at)
        what = f"{os.strerror(number)} at operation {at} of {len(names)}: {names[at - 1]}"
        with failing(Faults(home, at, raising(number))):
            try:
                run_plainly(request_for(root, home))
            except DdsrError as error:
                assert os.strerror(number) in str(error), what  # noqa: PT017
        check_the_next_run(root, home, what)


def test_a_crash_at_any_rename_of_a_run_loses_nothing(undisturbed: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, names = undisturbed
    renames = [number for number, name in enumerate(names, start=1) if name.startswith(("replace", "rename"))]
    assert len(renames) > 20
    for at in np.random.default_rng(SEED).permutation(renames)[:POINTS]:
        home = tmp_path / str(at)
        command = [sys.executable, "-m", "tests.faults.test_run_faults", str(root), str(home), str(at)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == CRASHED, done.stderr
        for manifest in home.glob("artifacts/*/*/manifest.json"):
            assert json.loads(manifest.read_text())["digest"] in digests(root / "home").values()
        check_the_next_run(root, home, f"crash at operation {at} of {len(names)}: {names[at - 1]}")


def main(root: str, home: str, at: str) -> None:
    """A run that ends in a crash at one operation."""
    torch.set_num_threads(1)
    with failing(Faults(Path(home), int(at), crash)):
        run_plainly(request_for(Path(root), Path(home)))


if __name__ == "__main__":
    main(*sys.argv[1:])
