"""What a night makes of what it finds: fake stages, real registry, store and locks."""

from __future__ import annotations

import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from ddsr_core.errors import ConfigError, InputError, StorageError, TrainingError
from ddsr_core.gc import collect_garbage
from ddsr_core.imaging.photos import Photo
from ddsr_core.nightly import night as nights
from ddsr_core.nightly.night import Outcome, as_markdown, roll_back
from ddsr_core.nightly.registry import Version, read_photos, read_registry, write_registry
from ddsr_core.pipeline.run_folder import read_run
from ddsr_core.storage.store import Store
from tests.helpers.fake_night import NAME, Fakes, put, without_reports


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    without_reports(monkeypatch)
    return Fakes()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return put(tmp_path / "photos", "a", "b", "c")


@pytest.fixture
def test_photos(tmp_path: Path) -> Path:
    return put(tmp_path / "test", "t")


def made(outcome: Outcome) -> Version:
    assert outcome.version is not None
    return outcome.version


def in_use(store: Store) -> float:
    """The quality of the set in ``current``."""
    return float((store.home / "nightly/n/current/metadata.jsonl").read_text())


def test_a_photo_that_is_renamed_touched_or_doubled_is_no_change(fakes, store, photos, test_photos):
    fakes.spend(store, photos, test_photos)
    (photos / "a.png").rename(photos / "z.png")
    (photos / "sub").mkdir()
    os.utime(photos / "b.png", (1, 1))
    shutil.copy(photos / "c.png", photos / "sub/c.png")
    assert fakes.spend(store, photos, test_photos).version is None


def test_changes_are_those_since_the_last_version(fakes, store, photos, test_photos):
    assert made(fakes.spend(store, photos, test_photos)).changes["photos"] == {"new": 3, "kept": 0, "dropped": 0}
    put(photos, "d", "e")
    (photos / "a.png").unlink()
    second = made(fakes.spend(store, photos, test_photos))
    assert second.changes["photos"] == second.changes["patches"] == {"new": 2, "kept": 2, "dropped": 1}
    assert second.anew["photos"] == 2
    assert sorted(read_photos(store, NAME, 2) or ()) == ["b.png", "c.png", "d.png", "e.png"]
    put(photos, "a")
    for name in "de":
        (photos / f"{name}.png").unlink()
    third = fakes.spend(store, photos, test_photos)  # the first version's photos: its patches are in the cache
    assert made(third).changes["photos"] == {"new": 1, "kept": 2, "dropped": 2}
    assert made(third).anew == {"photos": 0, "patches": 0}
    assert "| photos | 4 | 3 (1 new, 2 dropped; 0 scored this night) |" in as_markdown(third, NAME)


def test_a_worse_candidate_changes_nothing_and_the_next_continues_from_the_active_version(fakes, store, photos, test_photos):
    fakes.spend(store, photos, test_photos)
    put(photos, "d")
    fakes.quality = 19.0
    assert not made(fakes.spend(store, photos, test_photos, margin=0.5)).promoted
    assert in_use(store) == 20.0
    put(photos, "e")
    fakes.quality = 21.0
    third = made(fakes.spend(store, photos, test_photos, margin=0.5))
    assert (third.promoted, third.against, third.warm_from) == (True, 20.0, 1)
    assert in_use(store) == 21.0


def test_other_code_of_a_stage_is_another_setting(fakes, store, photos, test_photos, monkeypatch):
    fakes.spend(store, photos, test_photos)
    newer = replace(nights.clusters.STAGE, version=99)
    monkeypatch.setattr(nights, "STAGES", {**nights.STAGES, "clusters": newer})
    assert made(fakes.spend(store, photos, test_photos)).warm_from is None


def test_of_two_nights_at_once_one_works_and_one_finds_nothing_changed(fakes, store, photos, test_photos, caplog):
    outcomes = []
    threads = [threading.Thread(target=lambda: outcomes.append(fakes.spend(store, photos, test_photos))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(outcome.version is None for outcome in outcomes) == [False, True]
    assert len(read_registry(store, NAME).versions) == 1
    assert fakes.ran.count("finetune") == 1


def test_a_candidate_is_compared_with_the_version_that_a_rollback_made_active_meanwhile(fakes, store, photos, test_photos):
    for quality, name in ((20.0, "a"), (22.0, "d")):
        fakes.quality = quality
        fakes.spend(store, put(photos, name), test_photos)
    fakes.quality = 21.0
    fakes.before["sample"] = lambda: roll_back(store, NAME)
    third = fakes.spend(store, put(photos, "e"), test_photos)
    assert (made(third).promoted, made(third).against) == (True, 20.0)
    assert third.after.lineage == (1, 3)
    assert in_use(store) == 21.0


def test_a_version_that_another_night_has_written_is_not_lost(fakes, store, photos, test_photos):
    """As on S3, where a lock can be taken over from a night that was only slow."""
    fakes.spend(store, photos, test_photos)
    registry = read_registry(store, NAME)
    other = registry.versions[0].model_copy(update={"number": 2, "promoted": True})
    fakes.before["sample"] = lambda: write_registry(store, NAME, registry.with_version(other))
    with pytest.raises(StorageError, match="another night has made version 2"):
        fakes.spend(store, put(photos, "d"), test_photos)
    assert read_registry(store, NAME).versions == (*registry.versions, other)


def test_a_night_that_fails_leaves_all_as_it_was_and_can_be_repeated(fakes, store, photos, test_photos):
    fakes.spend(store, photos, test_photos)
    before = read_registry(store, NAME)

    def fail() -> None:
        raise TrainingError("a loss is not finite")

    fakes.before["finetune"], fakes.quality = fail, 21.0
    with pytest.raises(TrainingError):
        fakes.spend(store, put(photos, "d"), test_photos)
    assert read_registry(store, NAME) == before
    assert in_use(store) == 20.0
    assert read_run(store, "n-0002")["status"] == "failed"
    fakes.before.clear()
    assert made(fakes.spend(store, photos, test_photos)).number == 2


def test_cut_off_before_the_registry_is_written_the_night_is_done_again(fakes, store, photos, test_photos, monkeypatch):
    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(nights, "write_registry", cut_off)
        with pytest.raises(KeyboardInterrupt):
            fakes.spend(store, photos, test_photos)
    ran = len(fakes.ran)
    assert made(fakes.spend(store, photos, test_photos)).number == 1
    assert len(fakes.ran) == ran  # all of it comes from the cache
    shutil.rmtree(store.home / "nightly/n/current")  # as after a kill between two renames
    assert fakes.spend(store, photos, test_photos).version is None
    assert in_use(store) == 20.0


def test_photos_that_change_while_they_are_read_leave_no_wrong_patches(fakes, store, photos, test_photos):
    fakes.before["patches"] = lambda: put(photos, "late")
    with pytest.raises(InputError, match="changed while they were read"):
        fakes.spend(store, photos, test_photos)
    assert list((store.home / "artifacts/patches").glob("*/manifest.json")) == []
    assert made(fakes.spend(store, photos, test_photos)).changes["photos"]["new"] == 4


def test_photos_that_are_not_there_change_nothing(fakes, store, photos, test_photos, tmp_path):
    fakes.spend(store, photos, test_photos)
    before = read_registry(store, NAME)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(InputError):
            fakes.spend(store, folder, test_photos)
        with pytest.raises(InputError):
            fakes.spend(store, photos, folder)
    assert read_registry(store, NAME) == before
    assert in_use(store) == 20.0


def test_a_metric_that_is_not_measured_is_found_before_any_work(fakes, store, photos, test_photos):
    with pytest.raises(ConfigError, match="lpips"):
        fakes.spend(store, photos, test_photos, metric="lpips")
    assert fakes.ran == []


def test_the_set_in_use_shares_no_file_with_its_artifact(fakes, store, photos, test_photos):
    key = made(fakes.spend(store, photos, test_photos)).keys["sample"]
    (store.home / "nightly/n/current/metadata.jsonl").write_text("someone's")
    assert store.find("sample", key) is not None


def test_gc_keeps_what_versions_need_though_their_runs_are_gone(fakes, store, photos, test_photos):
    for name in "def":
        fakes.spend(store, put(photos, name), test_photos)
    shutil.rmtree(store.home / "runs")
    assert collect_garbage(store, delete=True)
    for number in (1, 2, 3):
        assert roll_back(store, NAME, number).active == number
    assert made(fakes.spend(store, put(photos, "g"), test_photos)).warm_from == 3

    roll_back(store, NAME, 1)
    collect_garbage(store, delete=True, nights=1)  # the last version and the active one stay
    assert roll_back(store, NAME, 4).active == 4
    assert roll_back(store, NAME, 1).active == 1
    with pytest.raises(StorageError, match="the sample artifact of version 2 is missing or damaged"):
        roll_back(store, NAME, 2)


def test_gc_refuses_while_a_night_goes_on(fakes, store, photos, test_photos):
    refused = []

    def collect() -> None:
        with pytest.raises(StorageError, match="a night of 'n', begun by process") as caught:
            collect_garbage(store, delete=True)
        refused.append(caught.value)

    fakes.before["sample"] = collect
    fakes.spend(store, photos, test_photos)
    assert len(refused) == 1


def test_a_training_photo_that_is_also_a_test_photo_is_left_out_and_said(fakes, store, photos, test_photos, caplog):
    put(test_photos, "b")
    (test_photos / "b.png").rename(test_photos / "other.png")
    first = made(fakes.spend(store, photos, test_photos))
    assert first.changes["photos"] == {"new": 2, "kept": 0, "dropped": 0}
    assert first.anew == {"photos": 2, "patches": 2}
    assert sorted(read_photos(store, NAME, 1) or ()) == ["a.png", "c.png"]
    assert [record.message for record in caplog.records if record.name == "ddsr.preflight"] == [
        "1 training photo is also a test photo and is left out of training: b.png"
    ]
    assert read_run(store, "n-0001")["left_out"] == 1
    assert fakes.spend(store, photos, test_photos).version is None
    (test_photos / "other.png").unlink()
    second = made(fakes.spend(store, photos, test_photos))
    assert second.changes["photos"] == {"new": 1, "kept": 2, "dropped": 0}
    assert read_run(store, "n-0002")["left_out"] == 0


def test_a_night_hashes_each_photo_once_and_makes_no_links_without_need(fakes, store, photos, test_photos, monkeypatch):
    hashed, digest = [], Photo.digest
    monkeypatch.setattr(Photo, "digest", lambda photo: hashed.append(photo.name) or digest(photo))
    fakes.spend(store, photos, test_photos)
    assert sorted(hashed) == ["a.png", "b.png", "c.png", "t.png"]
    assert not (store.home / "splits").exists()


def test_a_night_on_its_own_test_photos_is_refused(fakes, store, photos):
    with pytest.raises(ConfigError, match="all 3 training photos are test photos"):
        fakes.spend(store, photos, photos)
    assert read_registry(store, NAME).last is None
    assert fakes.ran == []


def test_a_byte_that_was_changed_in_the_current_set_is_put_right_by_the_next_night(fakes, store, photos, test_photos):
    fakes.spend(store, photos, test_photos)
    published = store.home / "nightly/n/current/metadata.jsonl"
    before = published.read_bytes()
    published.write_bytes(before.swapcase()[::-1])
    assert fakes.spend(store, photos, test_photos).version is None
    assert published.read_bytes() == before
