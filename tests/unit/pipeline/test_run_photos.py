"""Training and test photos of a run have no picture in common, and each is hashed once."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ddsr_core.errors import ConfigError
from ddsr_core.experiments.request import ExperimentRequest
from ddsr_core.imaging.photos import Photo, iter_photos, photo_source
from ddsr_core.pipeline.model_files import ModelFiles
from ddsr_core.pipeline.request import RunRequest
from ddsr_core.pipeline.run import open_run
from ddsr_core.pipeline.run_folder import list_runs
from ddsr_core.pipeline.stages import Backend
from ddsr_core.storage.store import Store
from tests.helpers.commands import make_photos

NOTICE = "1 training photo is also a test photo and is left out of training: 2.png"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(ModelFiles, "all_of", lambda *_: {})
    return Store(tmp_path / "home")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos", 3)


@pytest.fixture
def tests(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "test", 5, first=10)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each photo is hashed."""
    counts, digest = Counter[str](), Photo.digest

    def counting(photo: Photo) -> str:
        counts[photo.name] += 1
        return digest(photo)

    monkeypatch.setattr(Photo, "digest", counting)
    return counts


def no_build(*_: object) -> Any:
    raise AssertionError


def begin(request: RunRequest, store: Store) -> Any:
    return open_run(request, store, Backend(no_build, store.url))


def requests(**fields: Any) -> list[RunRequest]:
    overrides = ("clusters.k=2",)
    return [RunRequest(**fields, overrides=overrides), ExperimentRequest(**fields, overrides=overrides)]


@pytest.mark.parametrize("kind", [0, 1], ids=["distill", "reproduce"])
def test_a_test_photo_is_left_out_of_training_counted_and_said_once(
    store: Store, photos: Path, tests: Path, caplog: pytest.LogCaptureFixture, hashed: Counter[str], kind: int
):
    shutil.copy(photos / "2.png", tests / "renamed.png")
    with caplog.at_level(logging.WARNING, "ddsr.preflight"), begin(requests(images=photos, test=tests)[kind], store) as run:
        assert max(hashed.values()) == 1
        assert {photo.name for photo in iter_photos(run.photos.path)} == {"0.png", "1.png"}
        assert run.photos.digest == photo_source(run.photos.path).digest
        assert run.tests == photo_source(tests)
        assert run.left_out == 1
        name = run.name
    assert [record.message for record in caplog.records] == [NOTICE]
    assert (store.home / f"runs/{name}/logs/run.log").read_text().count(NOTICE) == 1
    state = json.loads((store.home / f"runs/{name}/run.json").read_text())
    assert (state["left_out"], state["images"], state["test"]) == (1, str(photos), str(tests))


@pytest.mark.parametrize("kind", [0, 1], ids=["distill", "reproduce"])
def test_sets_without_a_common_photo_are_used_as_they_are(
    store: Store, photos: Path, tests: Path, caplog: pytest.LogCaptureFixture, hashed: Counter[str], kind: int
):
    with begin(requests(images=photos, test=tests)[kind], store) as run:
        assert hashed == Counter({path.name: 1 for folder in (photos, tests) for path in folder.iterdir()})
        assert (run.photos, run.tests, run.left_out) == (photo_source(photos), photo_source(tests), 0)
    assert not caplog.records
    assert not (store.home / "splits").exists()


@pytest.mark.parametrize("kind", [0, 1], ids=["distill", "reproduce"])
def test_the_same_photos_for_training_and_test_are_refused_before_the_run_has_a_folder(
    store: Store, photos: Path, kind: int
):
    with pytest.raises(ConfigError, match="all 3 training photos are test photos"), \
         begin(requests(images=photos, test=photos)[kind], store):  # fmt: skip
        pass
    assert list_runs(store) == []


def test_without_networks_and_test_photos_all_photos_are_trained_on(store: Store, photos: Path, hashed: Counter[str]):
    request = RunRequest(images=photos, overrides=("clusters.k=2", "sr.archs=[]"))
    with begin(request, store) as run:
        assert set(hashed.values()) == {1}
        assert (run.photos, run.tests) == (photo_source(photos), None)
