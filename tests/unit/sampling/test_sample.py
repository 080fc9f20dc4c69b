"""The sampling stage: files, selection, the check for copies, sampling from real patches, resume."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from ddsr_core.config import Runtime
from ddsr_core.diffusion.decoding import decode_pixels
from ddsr_core.errors import InputError
from ddsr_core.imaging.bicubic import psnr_bic
from ddsr_core.imaging.decode import decode_rgb, read_rgb
from ddsr_core.imaging.images import to_float
from ddsr_core.sampling import sample as sampling
from ddsr_core.sampling.config import SampleConfig
from ddsr_core.sampling.sample import load_tuned
from tests.helpers.interruption import Killed, digests, killing_after
from tests.helpers.sample_inputs import patch_rows, write_random_latents
from tests.helpers.tiny_base import IMAGE_PX, write_base, write_clusters

CONFIG = SampleConfig(count=10, steps=3, oversample=2, batch_size=4, max_cosine=1.0)


@pytest.fixture(scope="module")
def finished(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    sampling.run(CONFIG, **inputs, out=out, runtime=Runtime())
    return out


def rows_of(folder: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def image_hashes(folder: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((folder / "images").iterdir())]


def test_the_image_set_and_its_measurements(finished: Path, inputs: dict[str, Path]):
    rows = rows_of(finished)
    assert [row["file_name"] for row in rows] == [f"images/{i:06d}.png" for i in range(10)]
    assert [row["pseudo_label"] for row in rows] == [0] * 4 + [1] * 3 + [2] * 3  # cluster 0 has one patch more
    ids = {row["patch_id"] for row in patch_rows(inputs["patches"])}
    for row in rows:
        image = read_rgb(finished / row["file_name"])
        assert image.shape == (IMAGE_PX, IMAGE_PX, 3)
        assert row["psnr_bic"] == pytest.approx(float(psnr_bic(to_float(image))), abs=1e-3)
        assert {row["nearest_patch_id"], row["nearest_patch_id_by_embedding"]} <= ids
        assert -1 <= row["max_cosine_to_train"] <= 1
        assert -1 <= row["max_embedding_cosine_to_train"] <= 1
        assert row["init_patch_id"] is None
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["count"], summary["height"], summary["width"]) == (10, IMAGE_PX, IMAGE_PX)
    assert (summary["candidates"], summary["refused"]) == (20, 0)
    assert summary["psnr_bic_mean"] == pytest.approx(np.mean([row["psnr_bic"] for row in rows]), abs=1e-3)
    for name in ("max_cosine_to_train", "max_embedding_cosine_to_train"):
        assert summary[name] == max(row[name] for row in rows)
    assert summary["psnr_bic_wasserstein_db"] > 0
    assert 0 < summary["coverage"] < 1
    table = pq.read_table(finished / "images.parquet")
    assert table["image"][0].as_py()["bytes"] == (finished / "images/000000.png").read_bytes()


def test_images_that_resemble_their_own_cluster_are_selected_first(inputs: dict[str, Path], tmp_path: Path):
    shares = {}
    for own in (False, True):
        config = CONFIG.model_copy(update={"count": 7, "oversample": 6, "own_cluster": own})
        sampling.run(config, **inputs, out=tmp_path / str(own), runtime=Runtime())
        shares[own] = json.loads((tmp_path / str(own) / "summary.json").read_text())["own_cluster_share"]
    assert shares[True] > shares[False]


@pytest.mark.parametrize(
    ("title", "amount"),
    [("Sampling", 4), ("Sampling", 12), ("Describing the samples", 20), ("Comparing with real patches", 16)],
)
def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(
    inputs: dict[str, Path], finished: Path, tmp_path: Path, title: str, amount: int
):
    with pytest.raises(Killed):
        sampling.run(CONFIG, **inputs, out=tmp_path, runtime=killing_after(title, amount))
    sampling.run(CONFIG, **inputs, out=tmp_path, runtime=Runtime())
    assert digests(tmp_path) == digests(finished)


def test_a_run_killed_within_a_batch_samples_that_batch_again_and_no_other(
    inputs: dict[str, Path], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write, batches = sampling.write_atomically, []

    def killed_at_the_tenth(path: Path, data: bytes) -> None:
        if path.name == "00000009.png":
            raise Killed
        write(path, data)

    with monkeypatch.context() as during:
        during.setattr(sampling, "write_atomically", killed_at_the_tenth)
        with pytest.raises(Killed):
            sampling.run(CONFIG, **inputs, out=tmp_path, runtime=Runtime())
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "resume" / "candidates").iterdir()}
    assert len(times) == 9
    draw = sampling._sample_batch
    monkeypatch.setattr(sampling, "_sample_batch", lambda *args: (batches.append(args[3]), draw(*args))[1])
    sampling.run(CONFIG, **inputs, out=tmp_path, runtime=Runtime())
    assert [batch[0] for batch in batches] == [8, 12, 16]
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    assert digests(tmp_path) == digests(finished)


def test_copies_of_training_patches_are_detected_and_rejected(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stored = patch_rows(inputs["patches"])[5]
    copy = decode_rgb(stored["image"]["bytes"], "copy")
    monkeypatch.setattr(sampling, "_sample_batch", lambda *args: np.stack([copy[:, ::-1], copy] * (len(args[3]) // 2)))
    sampling.run(CONFIG, **inputs, out=tmp_path / "kept", runtime=Runtime())
    for row in rows_of(tmp_path / "kept"):
        assert row["nearest_patch_id"] == stored["patch_id"]  # mirrored or not
        assert row["max_cosine_to_train"] == pytest.approx(1, abs=1e-4)
        if row["index"] % 2:
            assert row["nearest_patch_id_by_embedding"] == stored["patch_id"]
            assert row["max_embedding_cosine_to_train"] == pytest.approx(1, abs=1e-4)
    strict = CONFIG.model_copy(update={"max_cosine": 0.98})
    with pytest.raises(InputError, match="8 of 8 samples of pseudo-label 0 copy training patches"):
        sampling.run(strict, **inputs, out=tmp_path / "refused", runtime=Runtime())
    by_embedding = CONFIG.model_copy(update={"max_embedding_cosine": 0.9999})
    sampling.run(by_embedding, **inputs, out=tmp_path / "also", runtime=Runtime())
    assert all(row["index"] % 2 == 0 for row in rows_of(tmp_path / "also"))  # the mirrored ones: other embeddings


def test_a_rejected_candidate_is_passed_over(inputs: dict[str, Path], finished: Path, tmp_path: Path):
    """The limit is set just below the candidate of the undisturbed run that is most like a patch."""
    worst = max(row["max_cosine_to_train"] for row in rows_of(finished))
    strict = CONFIG.model_copy(update={"max_cosine": worst - 1e-4})
    sampling.run(strict, **inputs, out=tmp_path, runtime=Runtime())
    rows = rows_of(tmp_path)
    assert len(rows) == 10
    assert max(row["max_cosine_to_train"] for row in rows) < worst
    assert json.loads((tmp_path / "summary.json").read_text())["refused"] >= 1


def test_without_selection_the_first_samples_are_taken(inputs: dict[str, Path], tmp_path: Path):
    sampling.run(CONFIG.model_copy(update={"select": "none"}), **inputs, out=tmp_path, runtime=Runtime())
    assert [row["index"] for row in rows_of(tmp_path)] == [0, 1, 2, 3, 8, 9, 10, 14, 15, 16]


def test_the_two_kinds_of_weights_give_different_sets(inputs: dict[str, Path], finished: Path, tmp_path: Path):
    sampling.run(CONFIG.model_copy(update={"weights": "raw"}), **inputs, out=tmp_path, runtime=Runtime())
    assert image_hashes(tmp_path) != image_hashes(finished)


def test_tiles_larger_than_the_images_change_nothing(inputs: dict[str, Path], finished: Path, tmp_path: Path):
    sampling.run(CONFIG.model_copy(update={"decode_tile_px": 32}), **inputs, out=tmp_path, runtime=Runtime())
    assert image_hashes(tmp_path) == image_hashes(finished)


def test_half_precision_gives_nearly_the_same_pixels(inputs: dict[str, Path], tmp_path: Path):
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


def test_sampling_starts_from_the_patches_nearest_to_the_centroid_in_turn(inputs: dict[str, Path], tmp_path: Path):
    latents = write_random_latents(tmp_path / "latents", count=25)
    config = CONFIG.model_copy(update={"strength": 0.4, "select": "none", "count": 30, "oversample": 1, "steps": 5})
    sampling.run(config, **inputs, latents=latents, out=tmp_path / "out", runtime=Runtime())
    starts = [row["init_patch_id"] for row in rows_of(tmp_path / "out")]
    # Clusters of 9, 8 and 8 patches, the last of each the nearest; the tenth image starts from the patch of the first.
    numbers = [8, 7, 6, 5, 4, 3, 2, 1, 0, 8, *range(16, 8, -1), 16, 15, *range(24, 16, -1), 24, 23]
    assert starts == [f"{number:016x}_0_0" for number in numbers]


def test_a_low_strength_leaves_the_latent_nearly_unchanged(inputs: dict[str, Path], tmp_path: Path):
    latents = write_random_latents(tmp_path / "latents", count=25)
    model, _ = load_tuned(inputs["adapter"], inputs["base"], "ema", "cpu")
    stored = torch.from_numpy(np.load(latents / "mean.npy")[0].astype(np.float32))
    distance = {}
    for strength in (0.01, 0.9):
        config = CONFIG.model_copy(
            update={
                "strength": strength,
                "sampler": "ancestral",
                "steps": 1000 if strength == 0.01 else 10,
                "select": "none",
            }
        )
        out = tmp_path / str(strength)
        sampling.run(config.model_copy(update={"oversample": 1}), **inputs, latents=latents, out=out, runtime=Runtime())
        rows = rows_of(out)
        real = decode_pixels(model, stored[[int(row["init_patch_id"][:16], 16) for row in rows]])
        sampled = np.stack([read_rgb(out / row["file_name"]) for row in rows])
        distance[strength] = np.abs(sampled.astype(float) - real).mean()
    assert distance[0.01] < 0.5 * distance[0.9]


def test_sampling_from_patches_without_fitting_latents_is_refused(inputs: dict[str, Path], tmp_path: Path):
    config = CONFIG.model_copy(update={"strength": 0.5})
    with pytest.raises(InputError, match="needs their latents"):
        sampling.run(config, **inputs, out=tmp_path / "a", runtime=Runtime())
    other, fewer = (
        write_random_latents(tmp_path / "other", count=25, px=8),
        write_random_latents(tmp_path / "fewer", count=5),
    )
    with pytest.raises(InputError, match="latents belong to another base model"):
        sampling.run(config, **inputs, latents=other, out=tmp_path / "b", runtime=Runtime())
    with pytest.raises(InputError, match="has no latent"):
        sampling.run(config, **inputs, latents=fewer, out=tmp_path / "c", runtime=Runtime())


@pytest.mark.parametrize("interval", [(500, 100), (-1, 500), (0, 1000)])
def test_an_interval_rises_within_the_steps(interval: tuple[float, float]):
    with pytest.raises(ValidationError, match="guidance_interval"):
        SampleConfig(guidance_interval=interval)
