"""The store on a failing disk: at every operation of a whole build, an error is one message and a crash loses nothing.

The property, after SQLite's own tests: whatever fails at the n-th operation, for every n, nobody finds half an artifact, and
the next build makes the same artifact as one that was never disturbed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ddsr_core.errors import StorageError
from ddsr_core.imaging.hold_out import hold_out
from ddsr_core.imaging.images import save_png
from ddsr_core.imaging.photos import photo_source
from ddsr_core.pseudo_labels import patches
from ddsr_core.pseudo_labels.config import PatchesConfig
from ddsr_core.storage.files import write_atomically
from ddsr_core.storage.stage import Artifact, open_artifact
from ddsr_core.storage.store import Store
from tests.faults.filesystem import CRASHED, ERRORS, Faults, crash, failing, raising
from tests.helpers.toy_stage import TOY, CountConfig, inputs, key_of


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing is counted and may fail, but the real disk is not waited for."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.touch()
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for seed in range(3):
        image = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        save_png(tmp_path / f"photos/{seed}.png", image)
    return tmp_path / "photos"


def operations(home: Path, build: Callable[[Path], Artifact]) -> int:
    """How many operations an undisturbed build takes."""
    with failing(Faults(home)) as faults:
        build(home)
    assert {"write", "fsync", "replace", "rename", "open"} <= {name.split()[0] for name in faults.names}
    return faults.count


def check_survivors(home: Path, build: Callable[[Path], Artifact], undisturbed: Artifact, what: str) -> None:
    """Nothing half is found, and the next build ends as if nothing had happened."""
    stage, key = undisturbed.manifest.stage, undisturbed.key
    found = Store(home).find(stage, key)
    assert found is None or found.digest == undisturbed.digest, what
    artifact = build(home)
    assert artifact.digest == undisturbed.digest, what
    assert artifact.manifest.files == undisturbed.manifest.files, what
    assert open_artifact(artifact.path) == artifact, what
    left = [path.name for path in artifact.path.parent.iterdir()]
    assert sorted(left) in ([key], [key, f"{key}.lock"]), what


def build_toy(log: Path) -> Callable[[Path], Artifact]:
    return lambda home: Store(home).build(TOY, CountConfig(), inputs(log))[0]


def build_patches(photos: Path) -> Callable[[Path], Artifact]:
    config = PatchesConfig(patch_px=16, stride_px=16)
    return lambda home: Store(home).build(patches.STAGE, config, {"photos": photo_source(photos)})[0]


@pytest.mark.parametrize(("kind", "number"), [*(("toy", number) for number in ERRORS), ("patches", ERRORS[0])])
def test_an_error_at_any_operation_is_one_message_and_the_next_build_is_right(
    tmp_path: Path, log: Path, photos: Path, kind: str, number: int
) -> None:
    build = build_toy(log) if kind == "toy" else build_patches(photos)
    undisturbed = build(tmp_path / "undisturbed")
    total = operations(tmp_path / "counted", build)
    assert total > 40
    failed = 0
    for at in range(1, total + 1):
        home = tmp_path / "home"
        with failing(Faults(home, at, raising(number))) as faults:
            try:
                build(home)
            except StorageError as error:
                failed += 1
                assert os.strerror(number) in error.what, faults.names[-1]  # noqa: PT017
        check_survivors(home, build, undisturbed, f"operation {at}: {faults.names[at - 1]}")
        shutil.rmtree(home)
    assert failed > total * 3 // 4  # the others, such as a note for processes that wait, do no harm


def test_a_crash_at_any_operation_loses_nothing(tmp_path: Path, log: Path) -> None:
    build = build_toy(log)
    undisturbed = build(tmp_path / "undisturbed")
    total = operations(tmp_path / "counted", build)
    for at in range(1, total + 1):
        home = tmp_path / "home"
        child = os.fork()
        if child == 0:  # no cleaning up: the process is gone, and its lock with it
            with failing(Faults(home, at, crash)):
                build(home)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == CRASHED
        check_survivors(home, build, undisturbed, f"operation {at}")
        shutil.rmtree(home)


def test_a_crash_at_any_operation_of_a_write_leaves_the_old_content_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "home" / "registry.json"
    for at in range(1, 6):
        write_atomically(path, b"old" * 50)
        child = os.fork()
        if child == 0:
            with failing(Faults(tmp_path / "home", at, crash)):
                write_atomically(path, b"new" * 70)
            os._exit(0)
        os.waitpid(child, 0)
        assert path.read_bytes() in (b"old" * 50, b"new" * 70)


def test_a_split_on_a_failing_disk_is_one_message_and_the_next_one_is_right(tmp_path: Path, photos: Path) -> None:
    expected = hold_out(photos, tmp_path / "home")
    with failing(Faults(tmp_path / "counted")) as faults:
        hold_out(photos, tmp_path / "counted")
    failed = 0
    for at in range(1, faults.count + 1):
        home = tmp_path / "home"
        shutil.rmtree(home)
        with failing(Faults(home, at, raising(ERRORS[0]))):
            try:
                hold_out(photos, home)
            except StorageError:
                failed += 1
        assert hold_out(photos, home) == expected
        assert photo_source(expected[0].path).digest == expected[0].digest
    assert failed > faults.count // 2  # a folder that exists already need not be made


def test_a_flipped_bit_in_any_file_is_found_and_the_artifact_is_rebuilt(tmp_path: Path, photos: Path) -> None:
    build = build_patches(photos)
    built = build(tmp_path / "home")
    rng = np.random.default_rng(0)
    for path in sorted(path for path in built.path.rglob("*") if path.is_file()):
        for _ in range(4):
            data = bytearray(path.read_bytes())
            data[rng.integers(0, len(data))] ^= 1 << rng.integers(0, 8)
            path.write_bytes(data)
            found = Store(tmp_path / "home").find("patches", built.key)
            assert found is None or found == built, path.name
            assert build(tmp_path / "home").digest == built.digest


def test_the_key_of_the_toy_is_that_of_its_folder(tmp_path: Path, log: Path) -> None:
    assert build_toy(log)(tmp_path / "home").path.name == key_of(log)
