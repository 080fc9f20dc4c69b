"""The embeddings stage: the vectors in the table, the key of a weights file, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ddsr_core.config import Runtime
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.imaging.image_sets import write_image_parquet
from ddsr_core.imaging.images import encode_png, to_float
from ddsr_core.pipeline.config import load_config
from ddsr_core.pseudo_labels import embedders
from ddsr_core.pseudo_labels.config import EmbeddingsConfig
from ddsr_core.pseudo_labels.embedders import (
    Vgg16Embedder,
)
from ddsr_core.pseudo_labels.embeddings import read_config, run, weights_source
from ddsr_core.pseudo_labels.names import EMBEDDERS, Embedder
from ddsr_core.pseudo_labels.search import text_query
from ddsr_core.storage.vector_table import read_table

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
FIELDS = {"patch_id": pa.string(), "photo": pa.string(), "psnr_bic": pa.float32()}
VGG = EmbeddingsConfig(backend="vgg16", image_px=32, batch_size=3)


def textures(count: int, px: int = 32, seed: int = 0) -> np.ndarray:
    """Different random textures, uint8 (count, px, px, 3)."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (count, px // 4, px // 4, 3))
    fine = coarse.repeat(4, 1).repeat(4, 2) + random.integers(-40, 40, (count, px, px, 3))
    return fine.clip(0, 255).astype(np.uint8)


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    """Eight patches in two shards."""
    images = textures(8)
    rows = [
        {"image": encode_png(image), "patch_id": f"p{index}", "photo": f"{index // 4}.png", "psnr_bic": 20 + index / 3}
        for index, image in enumerate(images)
    ]
    folder = tmp_path / "patches"
    write_image_parquet(folder / "patches-00000.parquet", rows[:5], FIELDS)
    write_image_parquet(folder / "patches-00001.parquet", rows[5:], FIELDS)
    return folder


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random open_clip model of the architecture ``tiny``, in a weights file."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", TINY)
    torch.manual_seed(0)
    file = tmp_path / "tiny.safetensors"
    save_file(open_clip.create_model("tiny").state_dict(), file)
    return file


def embed(patches: Path, out: Path, config: EmbeddingsConfig = VGG) -> tuple[str | None, pa.Table, np.ndarray]:
    result = run(config, patches=patches, out=out, runtime=Runtime())
    return result.digest, *read_table(out)


def test_a_weights_file_enters_the_key_by_its_content(tiny: Path) -> None:
    config = EmbeddingsConfig(model="tiny", weights=str(tiny))
    before = weights_source(config)
    tiny.write_bytes(tiny.read_bytes() + b"\0")
    after = weights_source(config)
    assert before is not None
    assert after is not None
    assert before.digest != after.digest
    assert weights_source(EmbeddingsConfig()) is None
    assert weights_source(EmbeddingsConfig(backend="vgg16", weights=str(tiny))) is None


def test_the_table_has_one_unit_vector_per_patch_in_order(patches: Path, tmp_path: Path) -> None:
    _, columns, vectors = embed(patches, tmp_path / "out")
    assert columns["patch_id"].to_pylist() == [f"p{index}" for index in range(8)]
    assert columns["photo"].to_pylist() == ["0.png"] * 4 + ["1.png"] * 4
    assert columns.schema.field("psnr_bic").type == pa.float32()
    assert vectors.shape == (8, 512)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    with torch.inference_mode():
        expected = Vgg16Embedder(32)(to_float(textures(8))).numpy()
    np.testing.assert_allclose(vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
    assert read_config(tmp_path / "out") == VGG


def test_unnormalized_vectors_keep_their_length(patches: Path, tmp_path: Path) -> None:
    _, _, unit = embed(patches, tmp_path / "unit")
    _, _, raw = embed(patches, tmp_path / "raw", VGG.model_copy(update={"normalize": False}))
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert lengths.max() > 1.5 or lengths.min() < 0.5
    np.testing.assert_allclose(raw / lengths, unit, atol=1e-6)


def test_the_batch_size_changes_no_more_than_rounding(patches: Path, tmp_path: Path) -> None:
    _, _, three = embed(patches, tmp_path / "3")
    _, _, eight = embed(patches, tmp_path / "8", VGG.model_copy(update={"batch_size": 8}))
    np.testing.assert_allclose(three, eight, atol=2e-6)


def test_open_clip_as_backend(patches: Path, tmp_path: Path, tiny: Path) -> None:
    config = EmbeddingsConfig(model="tiny", weights="moved-away", batch_size=4)
    run(config, patches=patches, out=tmp_path / "out", runtime=Runtime(), weights=tiny)
    _, vectors = read_table(tmp_path / "out")
    assert vectors.shape == (8, 16)
    assert len(np.unique(vectors, axis=0)) == 8


def test_an_interrupted_run_continues_to_the_same_end(
    patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, _, _ = embed(patches, tmp_path / "whole")
    out, calls = tmp_path / "cut", []

    def interrupted(images: np.ndarray, *rest: Any) -> np.ndarray:
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(images, *rest)

    real = embedders.embed_images
    monkeypatch.setattr(embedders, "embed_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed(patches, out)
    (out / "lancedb/patches.lance").mkdir(parents=True)
    (out / "lancedb/patches.lance/half-written").write_bytes(b"left over")
    assert embed(patches, out)[0] == digest
    assert calls == [3, 3, 3, 3]  # four batches, the last two padded; the two finished ones are not repeated
    assert not list(out.rglob("half-written"))


def test_no_patches(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no patches"):
        run(VGG, patches=tmp_path, out=tmp_path / "out", runtime=Runtime())


class Averages(nn.Module):
    """The file of a new embedder: the mean of each color over each quarter of an image, d = 12. It has no parameters."""

    def __init__(self, config: EmbeddingsConfig, weights: Path | None) -> None:
        super().__init__()
        self.gain = float(weights.read_text()) if weights else 1.0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.gain * nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def test_a_new_embedder_is_a_module_and_one_line(patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EMBEDDERS, "averages", Embedder(f"{__name__}:Averages", takes_weights=True))
    gain = tmp_path / "gain.txt"
    gain.write_text("2.5")
    config = EmbeddingsConfig(backend="averages", weights=str(gain), normalize=False, batch_size=3)
    source = weights_source(config)
    assert source is not None
    run(config, patches=patches, out=tmp_path / "out", runtime=Runtime(), weights=source.path)
    columns, vectors = read_table(tmp_path / "out")
    assert columns["patch_id"].to_pylist() == [f"p{index}" for index in range(8)]
    quarters = textures(8).reshape(8, 2, 16, 2, 16, 3).mean((2, 4)).transpose(0, 3, 1, 2).reshape(8, 12) / 255
    np.testing.assert_allclose(vectors, 2.5 * quarters, atol=1e-5)
    assert read_config(tmp_path / "out") == config
    with pytest.raises(ConfigError, match="averages embeddings cannot be searched by words"):
        text_query("waves", config)
    with pytest.raises(ConfigError, match="class_row_init=clip_nearest"):
        load_config("paper", overrides=["embeddings.backend=averages", "finetune.class_row_init=clip_nearest"])
