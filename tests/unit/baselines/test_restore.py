"""Crops whose detail a teacher replaces."""

from pathlib import Path

import numpy as np
import pytest

from ddsr_core.baselines import crops, restore
from ddsr_core.baselines.config import CropsConfig, RestoreConfig
from ddsr_core.config import Runtime
from ddsr_core.imaging.bicubic import psnr_bic
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.image_sets import read_image_set
from ddsr_core.imaging.images import save_png, to_float, to_uint8
from ddsr_core.sampling.restoration import restore as restored
from ddsr_core.sr.weights import load_network
from tests.helpers.sample_inputs import write_teacher


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_every_crop_is_restored_and_measured(tmp_path: Path, share: float):
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    save_png(tmp_path / "photos/a.png", photo)
    plain, out = tmp_path / "crops", tmp_path / "restored"
    crops.run(CropsConfig(count=5, patch_px=16), photos=tmp_path / "photos", out=plain, runtime=Runtime())
    teacher = write_teacher(tmp_path / "teacher")
    result = restore.run(RestoreConfig(detail_restoration=share), crops=plain, teacher=teacher, out=out, runtime=Runtime())
    before, after = read_image_set(plain), read_image_set(out)
    assert [(row["y"], row["x"]) for row in after] == [(row["y"], row["x"]) for row in before]
    images = {folder: to_float(np.stack([read_rgb(folder / row["file_name"]) for row in before])) for folder in (plain, out)}
    expected = to_uint8(restored(load_network(teacher).module, images[plain], share))
    assert np.array_equal(to_uint8(images[out]), expected)
    assert [row["psnr_bic"] for row in after] == pytest.approx(psnr_bic(images[out]).tolist(), abs=1e-3)
    assert result.counts["psnr_bic_mean"] == pytest.approx(np.mean([row["psnr_bic"] for row in after]), abs=1e-3)
