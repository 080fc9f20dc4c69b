"""The benchmarks around plans, at toy size."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from benchmarks import plan_vs_measured, rehearsal, threads
from ddsr_core.diffusion.base import load_base
from ddsr_core.imaging.images import save_png
from ddsr_core.planning.bench import textured
from ddsr_core.planning.shapes import base_shape


@pytest.fixture
def few_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("few_threads")
def test_planned_flops_are_those_of_a_run(tmp_path, capsys):
    for name, side in (("train", 320), ("test", 96)):
        save_png(tmp_path / name / "a.png", textured(side, side))
    settings = ["embeddings.batch_size=8", "latents.batch_size=8", "sample.detail_restoration=1"]
    plan_vs_measured.main([
        "--toy", "--photos", str(tmp_path / "train"), "--test", str(tmp_path / "test"),
        *(part for value in settings for part in ("--set", value)),
    ])  # fmt: skip
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[1].split()[0] for row in rows] == [
        "patches", "embeddings", "clusters", "latents", "class_rows", "finetune", "train_sr", "sample", "evaluate",
        "train_sr", "evaluate", "all",
    ]  # fmt: skip
    counted = {row[1].strip(): (float(row[2]), float(row[3])) for row in rows if float(row[3]) > 0}
    assert len(counted) == 10
    for name, (planned, measured) in counted.items():
        assert planned == pytest.approx(measured, rel=0.02, abs=0.02), name


def test_steps_are_timed_and_settings_compared():
    assert len(threads.time_steps("srformer-small", 1)) == 1
    text = threads.table({"default": {"idle": 10.0}, "ddsr": {"idle": 5.0}})
    assert text.splitlines()[2:] == ["| default | 10.0 | 1.00 |", "| ddsr | 5.0 | 0.50 |"]


def test_the_rehearsals_models_are_read_in_both_layouts_with_equal_weights(tmp_path):
    rehearsal.write_models(tmp_path, rehearsal.TOY)
    vae = tmp_path / "sd-vae-ft-mse"
    original = load_base(str(tmp_path / "DiT-XL-2-512x512.pt"), vae=vae)
    diffusers = load_base(str(tmp_path / "DiT-XL-2-512"))
    assert original.digest == diffusers.digest
    assert original.image_px == base_shape(str(tmp_path / "DiT-XL-2-512"), None).image_px == 64
    assert len(diffusers.class_names) == 1000


def test_the_rehearsal_has_a_row_per_stage():
    use = rehearsal.Use({"latents": rehearsal.StageUse(12.0, 3.5)}, minutes=2.0, disk_gib=1.0, killed_in="finetune")
    lines = rehearsal.table({"best": use}).splitlines()[2:]
    assert lines[0] == "| best | latents | 12 | 3.5 |"
    assert lines[1] == "| best | **all**, killed in finetune and continued | 120 | 3.5 |"


def test_textured_pictures_compress_like_photos():
    picture = textured(64, 64)
    assert picture.shape == (64, 64, 3)
    assert re.fullmatch("uint8", str(picture.dtype))
    assert float(np.std(picture)) > 20  # not flat
