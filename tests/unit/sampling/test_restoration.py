"""Detail restoration."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ddsr_core.config import Runtime
from ddsr_core.imaging.bicubic import make_lr, psnr_bic, upsample
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.images import to_float, to_uint8
from ddsr_core.sampling import sample as sampling
from ddsr_core.sampling.config import SAMPLED, SampleConfig
from ddsr_core.sampling.restoration import restore
from ddsr_core.sr.data import count_images
from ddsr_core.sr.weights import load_network
from ddsr_core.storage.stage import RESUME
from tests.helpers.sample_inputs import Bicubic, KnowsTheAnswer, write_teacher

CONFIG = SampleConfig(count=6, steps=3, oversample=4, batch_size=8, max_cosine=1.0, select="none")


def test_a_share_of_the_detail_is_restored_from_lr():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(restore(Bicubic(), images, 0.0), images)
    assert torch.equal(restore(Bicubic(), images, 1.0), upsample(make_lr(images)).clamp(0, 1))
    half = restore(Bicubic(), images, 0.5)
    assert torch.allclose(half, (images + upsample(make_lr(images)).clamp(0, 1)) / 2, atol=1e-6)
    assert restore(KnowsTheAnswer(images * 3 - 1), images, 1.0).min() == 0  # clamped to [0, 1]


def test_the_set_holds_restored_images_and_measures_those(inputs: dict[str, Path], tmp_path: Path):
    network = write_teacher(tmp_path / "teacher")
    sampled, restored = tmp_path / "sampled", tmp_path / "restored"
    sampling.run(CONFIG, **inputs, out=sampled, runtime=Runtime())
    config = CONFIG.model_copy(update={"detail_restoration": 1.0})
    sampling.run(config, **inputs, teacher=network, out=restored, runtime=Runtime())
    rows = {f: [json.loads(line) for line in (f / "metadata.jsonl").read_text().splitlines()] for f in (sampled, restored)}
    assert [row["index"] for row in rows[restored]] == [row["index"] for row in rows[sampled]]
    images = {f: to_float(np.stack([read_rgb(f / row["file_name"]) for row in rows[f]])) for f in rows}
    expected = to_uint8(restore(load_network(network).module, images[sampled], 1.0))
    assert np.array_equal(to_uint8(images[restored]), expected)
    measured = psnr_bic(images[restored]).tolist()
    assert [row["psnr_bic"] for row in rows[restored]] == pytest.approx(measured, abs=1e-3)
    assert rows[restored][0]["psnr_bic"] != rows[sampled][0]["psnr_bic"]
    summaries = {folder: json.loads((folder / "summary.json").read_text()) for folder in (sampled, restored)}
    for name in ("own_cluster_share", "precision", "recall", "psnr_bic_distance_db", "psnr_bic_sampled_mean"):
        assert summaries[restored][name] == summaries[sampled][name]
    assert summaries[sampled]["psnr_bic_sampled_mean"] == summaries[sampled]["psnr_bic_mean"]
    assert "restored" not in summaries[sampled]
    assert summaries[restored]["restored"]["psnr_bic_distance_db"] != summaries[restored]["psnr_bic_distance_db"]


def test_the_images_as_they_were_sampled_are_kept_beside_the_restored_ones(inputs: dict[str, Path], tmp_path: Path):
    sampled, restored = tmp_path / "sampled", tmp_path / "restored"
    sampling.run(CONFIG, **inputs, out=sampled, runtime=Runtime())
    config = CONFIG.model_copy(update={"detail_restoration": 1.0})
    sampling.run(config, **inputs, teacher=write_teacher(tmp_path / "teacher"), out=restored, runtime=Runtime())
    with zipfile.ZipFile(restored / SAMPLED) as archive:
        kept = {name: archive.read(name) for name in archive.namelist()}
    assert kept == {path.name: path.read_bytes() for path in sorted((sampled / "images").glob("*.png"))}
    assert not (sampled / SAMPLED).exists()
    shutil.rmtree(restored / RESUME)
    assert count_images(restored) == CONFIG.count  # they are no training images
