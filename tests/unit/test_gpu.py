"""Every stage that runs on a GPU, with the numbers of a real CUDA device against those of the CPU, in float32."""

import json
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from skimage import data as photos

from ddsr_core.config import Runtime
from ddsr_core.diffusion import finetune, latents
from ddsr_core.diffusion.config import LatentsConfig
from ddsr_core.diffusion.finetune_trainer import FinetuneTrainer
from ddsr_core.diffusion.latents import open_latents
from ddsr_core.evaluation import evaluate
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.images import save_png
from ddsr_core.pseudo_labels.embedders import embed_images, load_embedder
from ddsr_core.sampling import sample as sampling
from ddsr_core.sampling.config import SampleConfig
from ddsr_core.sr import perceptual, train_sr
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.recipes import GAN_RECIPES
from tests.helpers.sample_inputs import EMBEDDINGS, write_sample_inputs, write_teacher
from tests.helpers.tiny_base import write_base, write_patches
from tests.helpers.tiny_finetuning import CONFIG, LABEL_MAP, load_inputs, read_csv, write_inputs
from tests.unit.sr.test_gan import config_of, random_trunk

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ("cpu", "cuda")


def photo_folder(folder: Path) -> Path:
    for index, place in enumerate((0, 200)):
        save_png(folder / f"{index}.png", np.ascontiguousarray(photos.astronaut()[place : place + 128, place : place + 132]))
    return folder


def test_latents(tmp_path: Path):
    patches, base = write_patches(tmp_path / "patches"), write_base(tmp_path / "base")
    means = []
    for device in DEVICES:
        latents.run(LatentsConfig(), patches=patches, base=base, out=tmp_path / device, runtime=Runtime(device=device))
        means.append(np.array(open_latents(tmp_path / device).mean, np.float32))
    np.testing.assert_allclose(means[1], means[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "changes",
    [{}, {"lsr_mode": "pixels", "lsr_crop_px": 2, "x0_hat": "difference"}, {"accumulate": 2}, {"checkpointing": "on"}],
)
def test_fine_tuning_with_all_terms(tmp_path: Path, changes: dict[str, object]):
    inputs = write_inputs(tmp_path)
    config = CONFIG.model_copy(update={"precision": "fp32", "steps": 4, **changes})
    curves = []
    for device in DEVICES:
        finetune.run(config, **inputs, out=tmp_path / device, runtime=Runtime(device=device))
        rows = read_csv(tmp_path / device / "curves.csv")
        curves.append([[float(value) for value in row.values()] for row in rows])
    np.testing.assert_allclose(curves[1], curves[0], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("sampler", ["ancestral", "dpmpp", "unipc"])
def test_sampling(tmp_path: Path, sampler: str):
    inputs = write_sample_inputs(tmp_path)
    config = SampleConfig(count=6, steps=4, oversample=1, select="none", max_cosine=1.0, sampler=sampler)  # type: ignore[arg-type]
    pixels = []
    for device in DEVICES:
        sampling.run(config, **inputs, out=tmp_path / device, runtime=Runtime(device=device))
        paths = sorted((tmp_path / device / "images").iterdir())
        pixels.append(np.stack([read_rgb(path) for path in paths]).astype(float))
    assert np.abs(pixels[1] - pixels[0]).mean() < 1


def test_a_teacher_selects_and_restores(tmp_path: Path):
    inputs = {**write_sample_inputs(tmp_path), "teacher": write_teacher(tmp_path / "teacher")}
    config = SampleConfig(
        count=6, steps=3, oversample=2, select="none", max_cosine=1.0, sr_gain_share=0.5, detail_restoration=1.0
    )
    gains = []
    for device in DEVICES:
        sampling.run(config, **inputs, out=tmp_path / device, runtime=Runtime(device=device))
        rows = map(json.loads, (tmp_path / device / "metadata.jsonl").read_text().splitlines())
        gains.append(sorted(row["sr_gain_db"] for row in rows))
    np.testing.assert_allclose(gains[1], gains[0], atol=0.1)


def test_embeddings(tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    names = [str(index) for index in range(4)]
    vectors = [embed_images(images, load_embedder(EMBEDDINGS, device), EMBEDDINGS, names) for device in DEVICES]
    assert np.einsum("nd,nd->n", *vectors).min() > 0.99


@pytest.mark.parametrize("arch", ["edsr-small", "srformer-small"])
def test_sr_training(tmp_path: Path, arch: str):
    config = TrainSRConfig(arch=arch, iterations=5, batch_size=2, lr_patch_px=16, precision="fp32")
    data, losses = photo_folder(tmp_path / "photos"), []
    for device in DEVICES:
        result = train_sr.run(config, data=data, out=tmp_path / device, runtime=Runtime(device=device))
        losses.append(result.counts["final_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_evaluation(tmp_path: Path):
    config = EvaluateConfig(metrics=("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "lpips", "lpips_vgg"), crops=1, crop_px=48)
    test, weights, rows = photo_folder(tmp_path / "photos"), write_teacher(tmp_path / "network"), []
    for device in DEVICES:
        evaluate.run(config, test=test, weights=weights, out=tmp_path / device, runtime=Runtime(device=device))
        table = pq.read_table(tmp_path / device / "per_image.parquet").to_pylist()
        rows.append([[row[name] for name in config.metrics] for row in table])
    np.testing.assert_allclose(rows[1], rows[0], rtol=2e-3)


@pytest.mark.parametrize("recipe", sorted(GAN_RECIPES))
def test_training_against_a_discriminator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str):
    monkeypatch.setattr(perceptual, "WIDTHS", (4,) * 5)
    save_file(random_trunk("vgg19"), tmp_path / "trunk.safetensors")
    data, losses = photo_folder(tmp_path / "photos"), []
    for device in DEVICES:
        given = {"data": data, "out": tmp_path / device, "trunk": tmp_path / "trunk.safetensors"}
        result = train_sr.run(config_of(recipe, precision="fp32"), **given, runtime=Runtime(device=device))
        losses.append(result.counts["final_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_a_step_of_fine_tuning_waits_once(tmp_path: Path):
    base, data = load_inputs(write_inputs(tmp_path), "cuda")
    trainer = FinetuneTrainer(base, CONFIG, LABEL_MAP)
    trainer.advance(data)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.advance(data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(warning.message) for warning in caught) == 1
