"""SR gain: its value for known networks, and selection by it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ddsr_core.config import Runtime
from ddsr_core.errors import ConfigError
from ddsr_core.imaging.bicubic import make_lr, upsample
from ddsr_core.metrics.psnr_ssim import fidelity
from ddsr_core.sampling import sample as sampling
from ddsr_core.sampling.config import SampleConfig
from ddsr_core.sampling.sr_gain import PERFECT_DB, highest_gain, sr_gains
from tests.helpers.sample_inputs import Bicubic, KnowsTheAnswer, write_teacher

CONFIG = SampleConfig(count=6, steps=3, oversample=4, batch_size=8, max_cosine=1.0, select="none")


def test_bicubic_has_no_gain_and_a_perfect_network_the_highest():
    images = (torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    assert sr_gains(Bicubic(), images) == pytest.approx([0, 0, 0])
    of_bicubic = fidelity(upsample(make_lr(images)), images, crop_border=4).psnr_y.numpy()
    assert sr_gains(KnowsTheAnswer(images), images) == pytest.approx(PERFECT_DB - of_bicubic, abs=1e-4)


def test_a_flat_image_has_no_gain():
    flat = torch.full((1, 3, 32, 32), 128 / 255)
    assert sr_gains(KnowsTheAnswer(flat), flat) == pytest.approx([0])
    assert sr_gains(Bicubic(), flat) == pytest.approx([0])


def test_an_image_whose_detail_is_noise_gains_less_than_one_with_an_edge():
    """A network that sharpens restores an edge; what it makes of noise is wrong."""
    edge = torch.zeros(1, 3, 32, 32)
    edge[..., 15:] = 1
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)).round()

    class Sharpen(nn.Module):
        def forward(self, lr: torch.Tensor) -> torch.Tensor:
            return ((upsample(lr) - 0.5) * 3 + 0.5).clamp(0, 1)

    assert sr_gains(Sharpen(), edge)[0] > 1
    assert sr_gains(Sharpen(), noise)[0] < 0


def test_the_share_with_the_highest_gain_is_left():
    gains = np.array([0.1, 0.9, 0.5, 0.7])
    assert highest_gain(gains, 0.5, 1).tolist() == [1, 3]
    assert highest_gain(gains, 0.1, 3).tolist() == [1, 2, 3]  # as many as are wanted
    assert highest_gain(gains, 1.0, 1).tolist() == [0, 1, 2, 3]


def test_selected_images_have_a_higher_gain_the_smaller_the_share(inputs: dict[str, Path], tmp_path: Path):
    compared = {**inputs, "teacher": write_teacher(tmp_path / "teacher")}
    out = {share: tmp_path / str(share) for share in (1.0, 0.5, 0.25)}
    for share, folder in out.items():
        config = CONFIG.model_copy(update={"sr_gain_share": share, "oversample": 1 if share == 1 else 4})
        sampling.run(
            config.model_copy(update={"count": 24} if share == 1 else {}), **compared, out=folder, runtime=Runtime()
        )
    rows = {
        share: [json.loads(line) for line in (f / "metadata.jsonl").read_text().splitlines()] for share, f in out.items()
    }
    assert all(row["sr_gain_db"] is None for row in rows[1.0])
    best, half = (np.mean([row["sr_gain_db"] for row in rows[share]]) for share in (0.25, 0.5))
    assert best > half
    by_label = {label: sorted(row["index"] for row in rows[0.25] if row["pseudo_label"] == label) for label in range(3)}
    assert all(len(kept) == 2 for kept in by_label.values())


def test_selection_by_gain_without_a_network_is_refused_before_sampling(inputs: dict[str, Path], tmp_path: Path):
    with pytest.raises(ConfigError, match="need an SR network") as caught:
        sampling.run(CONFIG.model_copy(update={"sr_gain_share": 0.5}), **inputs, out=tmp_path / "out", runtime=Runtime())
    assert "sr_gain_share" in str(caught.value.where)
    with pytest.raises(ConfigError, match="need an SR network"):
        sampling.run(
            CONFIG.model_copy(update={"detail_restoration": 0.5}), **inputs, out=tmp_path / "out", runtime=Runtime()
        )
    assert not (tmp_path / "out").exists()
