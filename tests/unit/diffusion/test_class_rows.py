"""Class rows: the classes nearest each cluster, by their names in CLIP's space or by their centers in VGG16's."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from ddsr_core.config import Runtime
from ddsr_core.diffusion import class_rows
from ddsr_core.diffusion.base import CLASSES, base_source, load_class_centers
from ddsr_core.diffusion.class_rows import class_names, nearest_rows, sampled_patches
from ddsr_core.diffusion.config import ClassRowsConfig
from ddsr_core.diffusion.finetune import read_rows
from ddsr_core.diffusion.latents import batches_of_patches
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.imaging.images import to_float
from ddsr_core.pseudo_labels.config import EmbeddingsConfig
from ddsr_core.pseudo_labels.patch_features import PatchFeatures
from tests.helpers.published_models import write_diffusers, write_original
from tests.helpers.tiny_base import IMAGE_PX, SHAPE, write_base, write_clusters, write_patches

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


def test_a_cluster_starts_at_the_classes_that_its_patches_have_and_others_have_not(tmp_path: Path):
    base, patches, clusters = (tmp_path / name for name in ("base", "patches", "clusters"))
    write_base(base)
    write_patches(patches)
    write_clusters(clusters)  # patches 0 to 7 have pseudo-label 0, and so on
    features = PatchFeatures(IMAGE_PX, grid=2)
    vectors = torch.cat([features.vectors(to_float(pixels)) for _, pixels in batches_of_patches(patches, IMAGE_PX)])
    centers = torch.full((SHAPE.classes, 512), -1.0)  # features are not negative: far from every patch
    centers[4], centers[7], centers[9] = vectors[:6].mean(0), vectors[6], 0.1 * vectors[8:16].mean(0)  # a short one
    save_file({"centers": centers}, base / CLASSES)
    classes = (vectors @ torch.nn.functional.normalize(centers, dim=1).T).argmax(1).reshape(3, 8)
    assert set(classes.flatten().tolist()) == {4, 7, 9}
    shares = {row: (classes == row).float().mean(1) for row in (4, 7, 9)}
    weights = {row: float(share[0] ** 2 / share.mean()) for row, share in shares.items()}
    kept = sorted(weights, key=lambda row: -weights[row])[:2]
    config = ClassRowsConfig(by="centers", nearest=2)
    result = class_rows.run(config, clusters=clusters, base=base, patches=patches, out=tmp_path, runtime=Runtime())
    rows = read_rows(tmp_path)
    assert set(rows) == {0, 1, 2}
    total = sum(weights[row] for row in kept)
    assert rows[0] == pytest.approx({row: weights[row] / total for row in kept if weights[row]}, abs=1e-5)
    assert result.counts["by"] == "centers"
    covered = sum(float(shares[row][0]) for row in kept)
    assert json.loads((tmp_path / "rows.json").read_text())["shares_of_patches"]["0"] == pytest.approx(covered, abs=1e-3)


def test_centers_belong_to_the_digest_of_a_base_and_must_fit_its_classes(tmp_path: Path):
    base = write_base(tmp_path / "base")
    before = base_source(str(base)).digest
    with pytest.raises(InputError, match="no class centers"):
        load_class_centers(base)
    save_file({"centers": torch.zeros(SHAPE.classes, 512)}, base / CLASSES)
    assert base_source(str(base)).digest != before
    assert load_class_centers(base).shape == (SHAPE.classes, 512)
    save_file({"centers": torch.zeros(3, 512)}, base / CLASSES)
    with pytest.raises(InputError, match="not the centers of 12 classes"):
        load_class_centers(base)


def test_at_most_so_many_patches_of_each_cluster_are_compared():
    labels = {f"p{index}": int(index >= 5) for index in range(25)}
    chosen = sampled_patches(labels, 6)
    assert [sum(labels[name] == label for name in chosen) for label in (0, 1)] == [5, 6]
    assert chosen == sampled_patches(labels, 6)
