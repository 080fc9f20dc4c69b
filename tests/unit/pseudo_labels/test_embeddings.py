"""Embeddings: the networks against torchvision and open_clip, missing weights, resume, and the bytes of the table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import vgg16
from torchvision.transforms import v2

from ddsr_core.config import Runtime
from ddsr_core.errors import ConfigError, InputError, MissingWeightsError
from ddsr_core.imaging.images import encode_png, to_float, write_image_parquet
from ddsr_core.metrics.trunks import load_trunk
from ddsr_core.pseudo_labels import embeddings
from ddsr_core.pseudo_labels.embedders import IMAGENET_MEAN, IMAGENET_STD, OpenClipEmbedder, Vgg16Embedder, prepare
from ddsr_core.pseudo_labels.embeddings import EmbeddingsConfig, finish_vectors, read_config, run, weights_source
from ddsr_core.storage.vector_table import content_digest, read_table, write_table

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


def test_importing_the_stages_brings_no_heavy_library() -> None:
    heavy = ("torch", "lancedb", "sklearn", "open_clip", "pyarrow")
    modules = "ddsr_core.pseudo_labels.clusters, ddsr_core.pseudo_labels.search"
    code = f"import sys, {modules}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_vgg16_equals_torchvision() -> None:
    with torch.device("meta"):
        oracle = vgg16(weights=None, init_weights=False).features
    oracle.load_state_dict({k.removeprefix("features."): v for k, v in load_trunk("vgg16").items()}, assign=True)
    resize, normalize = v2.Resize(48, v2.InterpolationMode.BICUBIC), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    images = to_float(textures(2, px=64))
    before_last_pool = torch.nn.Sequential(*list(oracle)[:-1], torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    with torch.inference_mode():
        expected = before_last_pool(normalize(resize(images).clamp(0, 1)))
        actual = Vgg16Embedder(image_px=48)(images)
    assert actual.shape == (2, 512)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_prepare_crops_to_the_center_square() -> None:
    image = torch.zeros(1, 3, 40, 64)
    image[..., 12:52] = 1.0
    torch.testing.assert_close(prepare(image, 32, (0, 0, 0), (1, 1, 1)), torch.ones(1, 3, 32, 32))


def test_prepare_is_near_open_clips_own_preprocessing(tiny: Path) -> None:
    from PIL import Image

    model, _, preprocess = open_clip.create_model_and_transforms("tiny", str(tiny))
    (image,) = textures(1, px=64)
    config = model.visual.preprocess_cfg
    actual = prepare(to_float(image), 32, config["mean"], config["std"])
    off_by = (actual[0] - preprocess(Image.fromarray(image))).abs() * torch.tensor(config["std"])[:, None, None] * 255
    assert off_by.max() < 2.5  # Pillow rounds to 8 bit between the passes and after them


def test_an_open_clip_model_from_a_file(tiny: Path) -> None:
    embedder = OpenClipEmbedder("tiny", str(tiny)).eval()
    model = open_clip.create_model("tiny", str(tiny)).eval()
    images = to_float(textures(3))
    mean, std = (torch.tensor(model.visual.preprocess_cfg[name])[:, None, None] for name in ("mean", "std"))
    with torch.inference_mode():
        torch.testing.assert_close(embedder(images), model.encode_image((images - mean) / std))
        tokens = open_clip.get_tokenizer("tiny")(["breaking waves"])
        torch.testing.assert_close(embedder.embed_texts(["breaking waves"]), model.encode_text(tokens))


def test_a_tag_trained_with_quickgelu_is_run_with_quickgelu(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = {"file": str(tiny), "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"openai": published})
    images = to_float(textures(1))
    quick = open_clip.create_model("tiny", str(tiny), force_quick_gelu=True).eval()
    plain = OpenClipEmbedder("tiny", str(tiny)).eval()
    tagged = OpenClipEmbedder("tiny", "openai").eval()
    with torch.inference_mode():
        torch.testing.assert_close(tagged(images), quick.encode_image(prepare(images, 32, tagged.mean, tagged.std)))
        assert (tagged(images) - plain(images)).abs().max() > 1e-4


def test_weights_that_cannot_be_fetched_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for module in (constants, file_download.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeightsError) as caught:
        OpenClipEmbedder("ViT-B-32", "openai")
    assert caught.value.where == "embeddings.weights"
    fix = caught.value.fix or ""
    assert "open_clip_model.safetensors of timm/vit_base_patch32_clip_224.openai" in fix
    assert "embeddings.model=ViT-B-32-quickgelu" in fix
    assert "embeddings.backend=vgg16" in fix


@pytest.mark.parametrize(
    ("model", "weights", "error", "message"),
    [
        ("ViT-B-23", "openai", ConfigError, "no model 'ViT-B-23'"),
        ("ViT-B-32", "/no/such/file.safetensors", MissingWeightsError, "there is no file '/no/such/file.safetensors'"),
        ("ViT-B-32", "openia", MissingWeightsError, r"one of: .*openai"),
    ],
)
def test_wrong_names(model: str, weights: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OpenClipEmbedder(model, weights)


@pytest.mark.parametrize("name", ["junk.safetensors", "junk.pt", "other.safetensors"])
def test_a_file_that_is_no_such_model(tiny: Path, name: str) -> None:
    file = tiny.with_name(name)
    file.write_bytes(b"no weights at all")
    if name.startswith("other"):
        save_file({"visual.conv1.weight": torch.zeros(3, 3)}, file)
    with pytest.raises(InputError, match="cannot be loaded as weights of tiny"):
        OpenClipEmbedder("tiny", str(file))


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


def test_the_table_has_one_unit_vector_a_patch_in_order(patches: Path, tmp_path: Path) -> None:
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


def test_a_cut_off_run_continues_and_ends_the_same(patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest, _, _ = embed(patches, tmp_path / "whole")
    out, calls = tmp_path / "cut", []

    def interrupted(images: np.ndarray, *rest: Any) -> np.ndarray:
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(images, *rest)

    real = embeddings.embed_images
    monkeypatch.setattr(embeddings, "embed_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed(patches, out)
    (out / "lancedb/patches.lance").mkdir(parents=True)
    (out / "lancedb/patches.lance/half-written").write_bytes(b"left over")
    assert embed(patches, out)[0] == digest
    assert calls == [3, 3, 3, 3]  # four batches, the last two filled up; the two that were done are not done again
    assert not list(out.rglob("half-written"))


@pytest.mark.parametrize(("value", "message"), [(np.nan, "not finite"), (np.inf, "not finite"), (0.0, "zero vector")])
def test_vectors_that_say_nothing_are_refused_with_the_patch(value: float, message: str) -> None:
    vectors = np.ones((3, 4), np.float32)
    vectors[1] = value
    with pytest.raises(InputError, match=message) as caught:
        finish_vectors(vectors, normalize=False, names=["a", "b", "c"])
    assert caught.value.where == "b"


def test_no_patches(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no patches"):
        run(VGG, patches=tmp_path, out=tmp_path / "out", runtime=Runtime())


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(5000, 6)).astype(np.float32)
    columns = pa.table({"patch_id": [f"{index}" for index in range(5000)]})
    write_table(tmp_path, ((columns.slice(at, 700), vectors[at : at + 700]) for at in range(0, 5000, 700)))
    found, back = read_table(tmp_path)
    assert found.equals(columns)
    np.testing.assert_array_equal(back, vectors)


def test_the_digest_covers_ids_and_vectors_and_not_how_they_are_cut() -> None:
    vectors = np.arange(12, dtype=np.float32).reshape(4, 3)
    digest = content_digest("abcd", [vectors])
    assert digest == content_digest("abcd", [vectors[:1], vectors[1:]])
    assert digest != content_digest("abdc", [vectors])
    assert digest != content_digest("abcd", [vectors[::-1]])


def test_there_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no table of embeddings"):
        read_table(tmp_path)
