"""Class rows: the named classes nearest each cluster, in CLIP's space."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from ddsr_core.config import Runtime
from ddsr_core.diffusion import class_rows
from ddsr_core.diffusion.class_rows import class_names, nearest_rows
from ddsr_core.diffusion.config import ClassRowsConfig
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.pseudo_labels.config import EmbeddingsConfig
from tests.helpers.published_models import write_diffusers, write_original
from tests.helpers.tiny_base import write_base

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClassRowsConfig:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", TINY)
    torch.manual_seed(0)
    file = tmp_path / "tiny.safetensors"
    save_file(open_clip.create_model("tiny").state_dict(), file)
    return ClassRowsConfig(nearest=3, embeddings=EmbeddingsConfig(model="tiny", weights=str(file)))


def test_nearest_by_cosine_after_what_all_share_is_taken_off():
    shared = np.array([0.0, 0.0, 5.0])
    texts = np.array([[1, 0, 0], [0, 1, 0], [-1, -1, 0]], np.float32) + shared
    centroids = np.array([[0, 1, 0], [-1, -1, 0], [1, 0, 0]], np.float32) - shared
    assert nearest_rows(centroids, texts, 1).ravel().tolist() == [1, 2, 0]
    assert nearest_rows(centroids, texts, 3).shape == (3, 3)


def test_rows_and_their_names_are_written(config: ClassRowsConfig, tmp_path: Path):
    base = write_diffusers(tmp_path / "base")
    (tmp_path / "clusters").mkdir()
    np.save(tmp_path / "clusters/centroids.npy", np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32))
    result = class_rows.run(config, clusters=tmp_path / "clusters", base=base, out=tmp_path, runtime=Runtime())
    written = json.loads((tmp_path / "rows.json").read_text())
    assert sorted(written["rows"]) == ["0", "1", "2", "3"]
    for label, rows in written["rows"].items():
        assert len(set(rows)) == 3
        assert written["names"][label] == [f"thing {row}, stuff" for row in rows]
    assert len(set(map(tuple, written["rows"].values()))) == 4
    assert set(result.counts["nearest"]) == {"0", "1", "2", "3"}


def test_a_cluster_at_a_name_is_nearest_to_it(config: ClassRowsConfig, tmp_path: Path):
    names = list(class_names(write_diffusers(tmp_path / "base")).values())
    texts = class_rows.embed_names(config, names[:50], "cpu", None)
    assert nearest_rows(texts, texts, 1).ravel().tolist() == list(range(50))


def test_a_table_of_1000_classes_without_names_is_imagenets(tmp_path: Path):
    names = class_names(write_original(tmp_path / "dit.pt"))
    assert (len(names), names[0], names[999]) == (1000, "tench", "toilet tissue")


def test_classes_without_names_and_networks_without_text_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="have no names"):
        class_names(write_base(tmp_path / "base"))
    with pytest.raises(ConfigError, match="no text tower"):
        class_rows.run(
            ClassRowsConfig(embeddings=EmbeddingsConfig(backend="vgg16")), clusters=tmp_path, base=tmp_path / "base",
            out=tmp_path, runtime=Runtime(),
        )  # fmt: skip
