"""Mistakes are found before the first stage."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddsr_core.config import resolve_device
from ddsr_core.errors import ConfigError, DdsrError, InputError, StorageError
from ddsr_core.pipeline import preflight as module
from ddsr_core.pipeline.config import load_config
from ddsr_core.pipeline.preflight import check_request, notices_of, preflight
from ddsr_core.pipeline.request import RunRequest
from ddsr_core.pipeline.stages import require_patches
from ddsr_core.storage.store import Store
from tests.helpers.commands import make_photos


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos", 2)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"images": "nowhere"}, InputError, "--images"),
        ({"test": "nowhere"}, InputError, "--test"),
        ({"device": "gpu"}, ConfigError, "'gpu' is not a torch device"),
        ({"device": "cuda:97"}, ConfigError, "CUDA GPUs on this machine"),
        ({"run": "a/b"}, ConfigError, "cannot be the name of a run"),
        ({"overrides": ("clusters.k=many",)}, ConfigError, "clusters.k"),
        ({"overrides": ("sr.archs=['nomod:Net']",)}, ConfigError, "cannot import Net from nomod"),
        ({"overrides": ("sr.archs=['pathlib:Path']",)}, ConfigError, "pathlib:Path is not a torch.nn.Module"),
        ({"overrides": ("sample.detail_restoration=1", "teacher.arch=no:Net")}, ConfigError, "cannot import Net from no"),
        ({"overrides": ("patches.threshold_db=nan",)}, ConfigError, "patches.threshold_db"),
        ({"overrides": ("finetune.lambda_lsr=inf",)}, ConfigError, "finetune.lambda_lsr"),
        ({"overrides": ("clusters.k=" + "[" * 5000 + "]" * 5000,)}, ConfigError, "nested too deeply"),
        ({"overrides": ("a." * 5000 + "b=1",)}, ConfigError, "nested too deeply"),
    ],
)
def test_a_wrong_request_fails_before_any_work(
    photos: Path, tmp_path: Path, values: dict[str, Any], error: type[DdsrError], message: str
):
    request = RunRequest.model_validate({"images": photos, "test": photos, **values})
    with pytest.raises(error) as caught:
        check_request(request, Store(tmp_path / "home"))
    assert message in str(caught.value)
    assert "fix:" in str(caught.value)


def test_devices():
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="0 CUDA GPUs"):
            resolve_device("cuda")


def test_a_full_disk_is_said_before_the_run(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=3_000_000))
    with pytest.raises(StorageError, match="only 3 MB are free"):
        check_request(RunRequest(images=photos), Store(tmp_path / "home"))


def test_what_makes_results_say_less_is_noticed():
    config = load_config("demo", overrides=["clusters.k=3"])
    train = [(f"{n}.png", f"digest {n}") for n in range(10)]
    tests = [(f"test {n}.png", f"new {n}") for n in range(20)]
    assert notices_of(config, train, tests) == ()
    text = "4 training photos are also test photos and are left out of training: a, b, c, …"
    assert notices_of(config, train, tests, "abcd") == (text,)
    few, noise = notices_of(config, train[:2], tests[:1])
    assert few.startswith("2 different photos for 3 clusters")
    assert noise.startswith("1 test photos")


def test_fewer_patches_than_clusters_are_an_error_before_they_are_embedded():
    config = load_config("demo", overrides=["clusters.k=7"])
    require_patches(config, 7)
    with pytest.raises(ConfigError, match="6 patches were accepted, for 7 clusters"):
        require_patches(config, 6)


def test_a_dry_run_says_what_would_be_used(photos: Path, tmp_path: Path):
    shutil.copy(photos / "0.png", tmp_path / "copy.png")
    (tmp_path / "tests").mkdir()
    shutil.move(tmp_path / "copy.png", tmp_path / "tests/copy.png")
    found = preflight(RunRequest(images=photos, test=tmp_path / "tests", device="cpu"), Store(tmp_path / "home"))
    device = "device: cpu; runner: sequential"
    assert found.lines[:3] == (f"photos: 2 in {photos}", f"tests: 1 in {tmp_path / 'tests'}", device)
    assert found.notices[0] == "1 training photo is also a test photo and is left out of training: 0.png"
    assert found.notices[1].startswith("1 different photos for")
    assert sum("0.png" in notice for notice in found.notices) == 1
    assert not (tmp_path / "home/splits").exists()


def test_a_dry_run_refuses_the_same_photos_for_training_and_test(photos: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="all 2 training photos are test photos"):
        preflight(RunRequest(images=photos, test=photos, device="cpu"), Store(tmp_path / "home"))
