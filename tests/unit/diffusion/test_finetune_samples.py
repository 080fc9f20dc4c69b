"""Samples during fine-tuning."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ddsr_core.config import Runtime
from ddsr_core.diffusion import finetune
from ddsr_core.diffusion.finetune_samples import sample_sheet
from ddsr_core.diffusion.finetune_trainer import FinetuneTrainer
from tests.helpers.tiny_finetuning import CONFIG, LABEL_MAP, load_inputs, read_csv


def test_measured_texture_is_written(finished: Path, inputs: dict[str, Path]):
    rows = read_csv(finished / "texture.csv")
    assert [int(row["step"]) for row in rows] == [0, 3, 6, 9]
    _, data = load_inputs(inputs)
    expected = np.mean([data.latents.psnr_bic[(data.labels == label).numpy()].mean() for label in range(3)])
    assert all(float(row["real_db"]) == pytest.approx(expected, rel=1e-5) for row in rows)
    assert len({row["samples_db"] for row in rows}) == 4


@pytest.mark.parametrize(("image_px", "images", "steps"), [(16, 12, 12), (512, 3, 8)])
def test_large_base_models_make_small_sheets(
    inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, image_px: int, images: int, steps: int
):
    """The sheet of three pseudo-labels: four images of each, or one; a large decoder sees one image at a time."""
    base, _ = load_inputs(inputs)
    base = replace(base, info=base.info.model_copy(update={"image_px": image_px}))
    trainer = FinetuneTrainer(base, CONFIG, LABEL_MAP)
    calls, decoded = [], []
    base.dit.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    base.vae.decoder.register_forward_hook(lambda _, args, __: decoded.append(len(args[0])))
    sheet = sample_sheet(trainer)
    assert sheet.shape == (3 * 16, images // 3 * 16, 3)
    assert calls == [images] * steps
    assert decoded == ([12] if image_px == 16 else [1, 1, 1])


def test_sheets_can_be_turned_off(inputs: dict[str, Path], tmp_path: Path):
    config = CONFIG.model_copy(update={"sample_every": None, "steps": 2})
    finetune.run(config, **inputs, out=tmp_path, runtime=Runtime())
    assert (tmp_path / "adapter.safetensors").is_file()
    assert not (tmp_path / "samples").exists()
