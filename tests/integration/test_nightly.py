"""Nights in miniature: photos added, removed, unchanged; a candidate that is worse; rollback."""

from pathlib import Path

import pytest

from ddsr_core.imaging.image_sets import read_image_set
from ddsr_core.nightly import night as nights
from ddsr_core.nightly.night import Night, Outcome, as_markdown, photo_cache_of, roll_back, run_night
from ddsr_core.nightly.registry import read_registry
from ddsr_core.pipeline.config import load_config
from ddsr_core.pipeline.plain import plain_backend
from ddsr_core.pipeline.request import Execution
from ddsr_core.storage.store import Store
from tests.helpers.commands import TINY, make_photos

pytestmark = pytest.mark.slow


def spend(photos: Path, home: Path, **changes: object) -> Outcome:
    config = load_config("demo", overrides=TINY)
    test = photos.parent / "test"
    night = {"name": "n", "images": photos, "test": test, "config": config, "metric": "psnr_y", "margin": 100.0,
             "warm": True, "warm_steps": 1, **changes}  # fmt: skip
    store = Store(home)
    return run_night(Night(**night), store, plain_backend(Execution(), store, photo_cache=photo_cache_of("n")))  # type: ignore[arg-type]


def current(home: Path) -> list[str]:
    return [row["file_name"] for row in read_image_set(home / "nightly/n/current")]


def test_nights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    photos, home = make_photos(tmp_path / "photos", 3), tmp_path / "home"
    make_photos(tmp_path / "test", 1, first=10)
    first = spend(photos, home)
    assert first.version is not None
    assert (first.version.promoted, first.version.warm_from, first.version.reason) == (True, None, "the first version")
    assert len(current(home)) == 2
    assert (home / "runs/n-0001/report.html").is_file()

    unchanged = spend(photos, home)
    assert unchanged.version is None
    assert "nothing has changed since version 1" in as_markdown(unchanged, "n")
    assert not (home / "runs/n-0002").exists()

    make_photos(tmp_path / "more", 5)
    (tmp_path / "more/4.png").rename(photos / "4.png")
    (photos / "0.png").unlink()
    second = spend(photos, home)
    assert second.version is not None
    assert second.version.warm_from == 1
    assert second.version.promoted
    assert second.version.changes["photos"] == {"new": 1, "kept": 2, "dropped": 1}
    assert second.version.against == first.version.score  # measured once, the same then and now
    text = as_markdown(second, "n")
    assert "| photos | 3 | 3 (1 new, 1 dropped; 1 scored this night) |" in text
    assert "| active | version 1 | version 2 |" in text

    scores = iter([20.0, 21.0])
    monkeypatch.setattr(nights, "score_of", lambda *_: next(scores))
    (tmp_path / "more/3.png").rename(photos / "3.png")
    third = spend(photos, home, margin=0.5)
    assert third.version is not None
    assert not third.version.promoted
    assert third.after.active == 2
    assert "not promoted" in as_markdown(third, "n")

    assert roll_back(Store(home), "n").active == 1
    assert read_registry(Store(home), "n").active == 1
    assert len(read_registry(Store(home), "n").versions) == 3


def test_other_settings_start_from_the_base(tmp_path: Path):
    photos, home = make_photos(tmp_path / "photos", 3), tmp_path / "home"
    make_photos(tmp_path / "test", 1, first=10)
    spend(photos, home)
    other = load_config("demo", overrides=[*TINY, "sample.seed=5"])
    second = spend(photos, home, config=other)
    assert second.version is not None
    assert second.version.warm_from is None
