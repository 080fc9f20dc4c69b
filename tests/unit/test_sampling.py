"""The sampling stage: shares, selection, the memorisation check, resume."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from interruption import Killed, digests, killing_after
from tiny_base import IMAGE_PX, write_base, write_clusters, write_latents, write_patches

from ddsr_core import sampling
from ddsr_core.bicubic import psnr_bic
from ddsr_core.config import Runtime
from ddsr_core.diffusion import finetune
from ddsr_core.diffusion.finetune import FinetuneConfig
from ddsr_core.errors import InputError
from ddsr_core.images import decode_rgb, read_rgb, to_float
from ddsr_core.sampling import SampleConfig, choose, images_per_label, thumbnail_vectors

CONFIG = SampleConfig(count=10, steps=3, oversample=2, batch_size=4, max_cosine=1.0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("inputs")
    made = {
        "patches": write_patches(home / "patches"),
        "clusters": write_clusters(home / "clusters", count=25, k=3),
        "base": write_base(home / "base"),
    }
    config = FinetuneConfig(steps=2, epochs=None, batch_size=4, gamma_blocks=2, sample_every=2)
    learned = {"latents": write_latents(home / "latents", made["patches"], made["base"]), "clusters": made["clusters"]}
    finetune.run(config, **learned, base=made["base"], out=home / "adapter", runtime=Runtime())
    return {**made, "adapter": home / "adapter"}


@pytest.fixture(scope="module")
def finished(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    sampling.run(CONFIG, **inputs, out=out, runtime=Runtime())
    return out


def rows_of(folder: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("count", "sizes", "expected"),
    [(70, [5] * 7, [10] * 7), (10, [5, 9, 9], [3, 4, 3]), (2, [1, 2, 3], [0, 1, 1]), (5, [4, 4], [3, 2])],
)
def test_equal_shares_and_the_rest_to_the_largest(count: int, sizes: list[int], expected: list[int]):
    assert images_per_label(count, sizes) == expected


def test_choose_follows_the_distribution_and_not_the_lowest():
    target = np.linspace(20, 24, 101)
    candidates = np.array([10.0, 20.4, 21.2, 22.1, 22.9, 23.5, 30.0, 35.0])
    kept = choose(candidates, target, np.zeros(8, bool), 5)
    assert kept.tolist() == [1, 2, 3, 4, 5]


def test_choose_takes_refused_candidates_last():
    candidates = np.array([22.0, 22.0, 40.0])
    assert choose(candidates, np.array([22.0]), np.array([True, False, False]), 1).tolist() == [1]
    assert choose(candidates, np.array([22.0]), np.array([True, True, False]), 1).tolist() == [2]


def test_a_copy_a_mirror_image_and_a_brighter_copy_have_cosine_one():
    image = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0)) * 0.5
    other = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    vector = thumbnail_vectors(image)
    assert float((vector @ thumbnail_vectors(image + 0.2).T).item()) == pytest.approx(1, abs=1e-5)
    assert float((vector @ thumbnail_vectors(other).T).item()) < 0.2


def test_the_image_set_and_its_facts(finished: Path, inputs: dict[str, Path]):
    rows = rows_of(finished)
    assert [row["file_name"] for row in rows] == [f"images/{i:06d}.png" for i in range(10)]
    assert [row["pseudo_label"] for row in rows] == [0] * 4 + [1] * 3 + [2] * 3  # cluster 0 has one patch more
    ids = set(pq.read_table(inputs["patches"], columns=["patch_id"])["patch_id"].to_pylist())
    for row in rows:
        image = read_rgb(finished / row["file_name"])
        assert image.shape == (IMAGE_PX, IMAGE_PX, 3)
        assert row["psnr_bic"] == pytest.approx(float(psnr_bic(to_float(image))), abs=1e-3)
        assert row["nearest_patch_id"] in ids
        assert -1 <= row["max_cosine_to_train"] <= 1
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["count"], summary["height"], summary["width"]) == (10, IMAGE_PX, IMAGE_PX)
    assert summary["candidates"] == 20
    assert summary["psnr_bic_mean"] == pytest.approx(np.mean([row["psnr_bic"] for row in rows]), abs=1e-3)
    assert summary["max_cosine_to_train"] == max(row["max_cosine_to_train"] for row in rows)
    table = pq.read_table(finished / "images.parquet")
    assert table["image"][0].as_py()["bytes"] == (finished / "images/000000.png").read_bytes()


@pytest.mark.parametrize(("title", "amount"), [("Sampling", 4), ("Sampling", 12), ("Comparing with real patches", 16)])
def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(
    inputs: dict[str, Path], finished: Path, tmp_path: Path, title: str, amount: int
):
    with pytest.raises(Killed):
        sampling.run(CONFIG, **inputs, out=tmp_path, runtime=killing_after(title, amount))
    sampling.run(CONFIG, **inputs, out=tmp_path, runtime=Runtime())
    assert digests(tmp_path) == digests(finished)


def test_candidates_that_are_there_are_not_drawn_again(inputs: dict[str, Path], tmp_path: Path):
    with pytest.raises(Killed):
        sampling.run(CONFIG, **inputs, out=tmp_path, runtime=killing_after("Sampling", 8))
    first = tmp_path / "resume" / "candidates" / "00000000.png"
    before = first.stat().st_mtime_ns
    sampling.run(CONFIG, **inputs, out=tmp_path, runtime=Runtime())
    assert first.stat().st_mtime_ns == before


def test_copies_of_training_patches_are_found_and_refused(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stored = pq.read_table(inputs["patches"]).to_pylist()[5]
    copy = decode_rgb(stored["image"]["bytes"], "copy")[:, ::-1]  # mirrored

    def copying(config, model, rows, indices, device):  # type: ignore[no-untyped-def]
        return np.stack([copy] * len(indices))

    monkeypatch.setattr(sampling, "_draw", copying)
    sampling.run(CONFIG, **inputs, out=tmp_path / "kept", runtime=Runtime())
    row = rows_of(tmp_path / "kept")[0]
    assert row["nearest_patch_id"] == stored["patch_id"]
    assert row["max_cosine_to_train"] == pytest.approx(1, abs=1e-4)
    strict = CONFIG.model_copy(update={"max_cosine": 0.98})
    with pytest.raises(InputError, match="8 of 8 samples of pseudo-label 0 copy training patches"):
        sampling.run(strict, **inputs, out=tmp_path / "refused", runtime=Runtime())


def test_the_two_kinds_of_weights_give_different_sets(inputs: dict[str, Path], finished: Path, tmp_path: Path):
    sampling.run(CONFIG.model_copy(update={"weights": "raw"}), **inputs, out=tmp_path, runtime=Runtime())
    names = [f"images/{i:06d}.png" for i in range(10)]

    def content(folder: Path) -> list[str]:
        return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]

    assert content(tmp_path) != content(finished)


def test_half_precision_gives_nearly_the_same_pixels(inputs: dict[str, Path], finished: Path, tmp_path: Path):
    one = CONFIG.model_copy(update={"oversample": 1})
    images = {}
    for precision in ("fp32", "bf16"):
        config = one.model_copy(update={"precision": precision})
        sampling.run(config, **inputs, out=tmp_path / precision, runtime=Runtime())
        paths = sorted((tmp_path / precision / "images").iterdir())
        images[precision] = np.stack([read_rgb(path) for path in paths]).astype(float)
    difference = np.abs(images["fp32"] - images["bf16"])
    assert 0 < difference.mean() < 8


def test_an_adapter_of_another_base_and_of_other_clusters_is_refused(inputs: dict[str, Path], tmp_path: Path):
    other = write_base(tmp_path / "base", seed=1)
    with pytest.raises(InputError, match="another base model"):
        sampling.run(CONFIG, **{**inputs, "base": other}, out=tmp_path / "a", runtime=Runtime())
    more = write_clusters(tmp_path / "clusters", k=5)
    with pytest.raises(InputError, match=r"does not know the pseudo-labels \[3, 4\]"):
        sampling.run(CONFIG, **{**inputs, "clusters": more}, out=tmp_path / "b", runtime=Runtime())
