"""Scoring: every photo once, reasons for what is skipped, and photos that change while they are read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ddsr_core.config import Runtime
from ddsr_core.errors import ChangedInputError
from ddsr_core.imaging.images import save_png
from ddsr_core.imaging.photos import photo_source
from ddsr_core.pseudo_labels import patches, scoring
from ddsr_core.pseudo_labels.config import PatchesConfig
from ddsr_core.pseudo_labels.scoring import ScoredPhoto
from ddsr_core.storage.store import Store
from tests.unit.pseudo_labels.test_patches import CONFIG, photo


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for seed in range(3):
        save_png(tmp_path / f"photos/{seed}.png", photo(seed))
    return tmp_path / "photos"


def build(photos: Path, home: Path, config: PatchesConfig = CONFIG) -> str:
    artifact, _ = Store(home).build(patches.STAGE, config, {"photos": photo_source(photos)})
    return artifact.digest


def when(monkeypatch: pytest.MonkeyPatch, module: object, name: str, act: Callable[[], None]) -> None:
    """Do something once, before a function of the stage is called."""
    real, done = getattr(module, name), []

    def wrapped(*args: object, **kwargs: object) -> object:
        if not done:
            done.append(1)
            act()
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapped)


@pytest.mark.parametrize("at", ["score_photos", "_write_patches"])
def test_a_photo_that_is_replaced_during_the_run_ends_it_and_the_next_run_is_right(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    home = tmp_path / "home"
    with monkeypatch.context() as patch:
        when(patch, patches, at, lambda: save_png(photos / "1.png", photo(9)))
        with pytest.raises(ChangedInputError, match="run again"):
            build(photos, home)
    assert not list((home / "artifacts/patches").glob("*.partial"))
    assert build(photos, home) == build(photos, tmp_path / "undisturbed")


def test_a_photo_that_is_replaced_and_put_back_leaves_nothing_behind(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, original = tmp_path / "home", (photos / "1.png").read_bytes()
    undisturbed = build(photos, tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        when(patch, patches, "score_photos", lambda: save_png(photos / "1.png", photo(9)))
        when(patch, patches, "_write_patches", lambda: (photos / "1.png").write_bytes(original) and None)
        with pytest.raises(ChangedInputError):
            build(photos, home)
    assert build(photos, home) == undisturbed


def test_a_photo_that_vanishes_before_it_is_cut(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    when(monkeypatch, patches, "_write_patches", lambda: shutil.move(photos / "1.png", tmp_path / "1.png") and None)
    with pytest.raises(ChangedInputError, match="changed during the run"):
        build(photos, tmp_path / "home")


def test_an_unreadable_photo_has_the_same_key_in_every_run(photos: Path, tmp_path: Path) -> None:
    (photos / "broken.jpg").write_bytes(b"not an image")
    (photos / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (photos / "raw.dng").write_bytes(bytes(100))
    digests = {build(photos, tmp_path / home) for home in ("one", "two")}
    assert len(digests) == 1
    artifact, cached = Store(tmp_path / "one").build(patches.STAGE, CONFIG, {"photos": photo_source(photos)})
    assert cached
    assert artifact.manifest.counts["skipped"] == {"unreadable": 2, "unsupported": 1}


def test_scores_come_back_exactly(photos: Path) -> None:
    from ddsr_core.imaging.decode import read_rgb
    from ddsr_core.pseudo_labels.windows import score_windows

    windows = score_windows(read_rgb(photos / "0.png"), CONFIG)
    back = ScoredPhoto.from_json(ScoredPhoto("d", "", windows).to_json()).windows
    for name in ("psnr_bic", "y", "x"):
        assert getattr(back, name).tobytes() == getattr(windows, name).tobytes()


def test_large_photos_are_scored_one_at_a_time(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory that all threads share fits a single one of these photos."""
    from threading import Lock

    from ddsr_core.imaging import decode
    from ddsr_core.parallel import MemoryBudget

    monkeypatch.setattr(decode, "_MEMORY", MemoryBudget(96 * 128 * decode.BYTES_PER_PIXEL))
    running, most, lock, real = [0], [0], Lock(), scoring.score_windows

    def counted(*args: object) -> object:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        result = real(*args)  # type: ignore[arg-type]
        with lock:
            running[0] -= 1
        return result

    monkeypatch.setattr(scoring, "score_windows", counted)
    patches.run(CONFIG, photos=photos, out=tmp_path, runtime=Runtime())
    assert most == [1]
