"""SR gain: what it is of networks that are known, and how a choice goes by it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ddsr_core.config import Runtime
from ddsr_core.diffusion import finetune
from ddsr_core.diffusion.config import FinetuneConfig
from ddsr_core.errors import ConfigError
from ddsr_core.imaging.bicubic import make_lr, psnr_bic, upsample
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.images import to_float, to_uint8
from ddsr_core.metrics.psnr_ssim import fidelity
from ddsr_core.sampling import sample as sampling
from ddsr_core.sampling.config import SampleConfig
from ddsr_core.sampling.init_patches import init_patches
from ddsr_core.sampling.restoration import restore
from ddsr_core.sampling.selection import farthest_first
from ddsr_core.sampling.sr_gain import PERFECT_DB, highest_gain, sr_gains
from ddsr_core.sr.architectures import build_network
from ddsr_core.sr.weights import load_network, save_weights
from tests.helpers.sample_inputs import write_clusters_with_distances, write_embeddings
from tests.helpers.tiny_base import write_base, write_latents, write_patches


class Bicubic(nn.Module):
    def forward(self, lr: torch.Tensor) -> torch.Tensor:
        return upsample(lr)


class Knows(nn.Module):
    """Has the answer."""

    def __init__(self, hr: torch.Tensor) -> None:
        super().__init__()
        self.hr = hr

    def forward(self, lr: torch.Tensor) -> torch.Tensor:
        return self.hr


def test_bicubic_gains_nothing_and_who_knows_the_answer_gains_everything():
    images = (torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    assert sr_gains(Bicubic(), images) == pytest.approx([0, 0, 0])
    of_bicubic = fidelity(upsample(make_lr(images)), images, crop_border=4).psnr_y.numpy()
    assert sr_gains(Knows(images), images) == pytest.approx(PERFECT_DB - of_bicubic, abs=1e-4)


def test_a_flat_image_has_no_gain():
    flat = torch.full((1, 3, 32, 32), 128 / 255)
    assert sr_gains(Knows(flat), flat) == pytest.approx([0])
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


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("inputs")
    made = {
        "patches": write_patches(home / "patches", count=25),
        "clusters": write_clusters_with_distances(home / "clusters", count=25, k=3),
        "base": write_base(home / "base"),
    }
    learned = {"latents": write_latents(home / "latents", made["patches"], made["base"]), "clusters": made["clusters"]}
    config = FinetuneConfig(steps=1, epochs=None, batch_size=4, gamma_blocks=2)
    finetune.run(config, **learned, base=made["base"], out=home / "adapter", runtime=Runtime())
    return {**made, "adapter": home / "adapter", "embeddings": write_embeddings(home / "embeddings", made["patches"])}


def teacher(folder: Path) -> Path:
    torch.manual_seed(0)
    kwargs = {"feat": 4, "blocks": 1}
    save_weights(folder, build_network("edsr-small", kwargs), "edsr-small", kwargs, 4, {})
    return folder


CONFIG = SampleConfig(count=6, steps=3, oversample=4, batch_size=8, max_cosine=1.0, select="none")


def test_what_is_kept_gains_more_than_what_is_left(inputs: dict[str, Path], tmp_path: Path):
    compared = {**inputs, "teacher": teacher(tmp_path / "teacher")}
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


def test_a_choice_by_gain_without_a_network_is_refused_before_anything_is_drawn(inputs: dict[str, Path], tmp_path: Path):
    with pytest.raises(ConfigError, match="need an SR network") as caught:
        sampling.run(CONFIG.model_copy(update={"sr_gain_share": 0.5}), **inputs, out=tmp_path / "out", runtime=Runtime())
    assert "sr_gain_share" in str(caught.value.where)
    with pytest.raises(ConfigError, match="need an SR network"):
        sampling.run(
            CONFIG.model_copy(update={"detail_restoration": 0.5}), **inputs, out=tmp_path / "out", runtime=Runtime()
        )
    assert not (tmp_path / "out").exists()


def test_a_share_of_the_detail_is_restored_from_lr():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(restore(Bicubic(), images, 0.0), images)
    assert torch.equal(restore(Bicubic(), images, 1.0), upsample(make_lr(images)).clamp(0, 1))
    half = restore(Bicubic(), images, 0.5)
    assert torch.allclose(half, (images + upsample(make_lr(images)).clamp(0, 1)) / 2, atol=1e-6)
    assert restore(Knows(images * 3 - 1), images, 1.0).min() == 0  # what a network makes may leave [0, 1]; an image may not


def test_the_set_holds_restored_images_and_describes_those(inputs: dict[str, Path], tmp_path: Path):
    network = teacher(tmp_path / "teacher")
    drawn, restored = tmp_path / "drawn", tmp_path / "restored"
    sampling.run(CONFIG, **inputs, out=drawn, runtime=Runtime())
    config = CONFIG.model_copy(update={"detail_restoration": 1.0})
    sampling.run(config, **inputs, teacher=network, out=restored, runtime=Runtime())
    rows = {f: [json.loads(line) for line in (f / "metadata.jsonl").read_text().splitlines()] for f in (drawn, restored)}
    assert [row["index"] for row in rows[restored]] == [row["index"] for row in rows[drawn]]  # chosen as they were drawn
    images = {f: to_float(np.stack([read_rgb(f / row["file_name"]) for row in rows[f]])) for f in rows}
    expected = to_uint8(restore(load_network(network).module, images[drawn], 1.0))
    assert np.array_equal(to_uint8(images[restored]), expected)
    measured = psnr_bic(images[restored]).tolist()
    assert [row["psnr_bic"] for row in rows[restored]] == pytest.approx(measured, abs=1e-3)
    assert rows[restored][0]["psnr_bic"] != rows[drawn][0]["psnr_bic"]


def test_farthest_first_on_a_line():
    assert farthest_first(np.array([[0.0], [1.0], [5.0], [9.0]]), 4, first=1) == [1, 3, 2, 0]


def test_starts_are_spread_over_a_cluster(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ddsr_core.storage.vector_table import write_table

    names = ["a", "b", "c", "d"]
    distances = [0.1, 0.2, 0.9, 0.5]
    columns = {"patch_id": names, "pseudo_label": [0] * 4, "distance": distances}
    write_table(tmp_path, [(pa.table(columns), np.array([[0, 0.0], [0, 1], [0, 9], [0, 5]], np.float32))])
    pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
    labels = np.zeros(5, int)
    assert init_patches(labels, tmp_path) == ["a", "b", "d", "c", "a"]
    assert init_patches(labels, tmp_path, "k-center") == ["a", "c", "d", "b", "a"]
