"""The presets for DiT-XL on small random models in the layouts that it is published in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, TINY, make_photos
from tests.helpers.published_models import small_kl, small_taesd, write_diffusers, write_original

pytestmark = pytest.mark.slow
SMALL = (*TINY, "patches.quantile=0.5", "embeddings.backend=vgg16", "sr.archs=[]", "sample.guidance_scale=2.0")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    write_diffusers(home / "dit", safe=False)
    write_original(home / "DiT-XL-2-512x512.pt")
    small_kl().save_pretrained(home / "sd-vae", safe_serialization=False)
    small_taesd().save_pretrained(home / "taesd")
    return home


def distill(photos: Path, home: Path, preset: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli.main", "distill", "--images", str(photos), "--home", str(home)]
    command += ["--preset", preset, "--no-prefect", "--json"]
    for text in (*SMALL, *overrides):
        command += ["--set", text]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("released", ("base={}/DiT-XL-2-512x512.pt", "vae={}/sd-vae")),
        ("paper", ("base={}/dit", "vae={}/sd-vae", "finetune.lsr_crop_px=8")),
        (
            "best",
            ("base={}/dit", "vae={}/sd-vae", "lsr_decoder={}/taesd", "finetune.class_row_init=null", "sample.strength=0.6"),
        ),
    ],
)
def test_a_preset_runs_to_its_distilled_set(tmp_path: Path, models: Path, preset: str, overrides: tuple[str, ...]):
    photos = make_photos(tmp_path / "photos", count=2)
    done = distill(photos, tmp_path / "home", preset, *(text.format(models) for text in overrides))
    assert done.returncode == 0, done.stderr
    folder = Path(json.loads(done.stdout)["folder"]) / "distilled"
    assert len(list((folder / "images").glob("*.png"))) == 2
    latents = next((tmp_path / "home/artifacts/latents").glob("*/summary.json"))
    assert json.loads(latents.read_text())["variational"]


def test_missing_weights_stop_a_run_before_any_work(tmp_path: Path):
    photos = make_photos(tmp_path / "photos", count=1)
    done = distill(photos, tmp_path / "home", "best", f"base={tmp_path}/nowhere", "finetune.class_row_init=null")
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert "fix:" in done.stderr
    assert not list((tmp_path / "home").glob("artifacts/*/*"))


def test_class_names_without_a_text_tower_are_refused_at_once(tmp_path: Path):
    done = distill(tmp_path, tmp_path / "home", "best")
    assert done.returncode == 1
    assert "set finetune.class_row_init=auto" in done.stderr
