"""Embedders: VGG16 against torchvision, open_clip models against open_clip, and weights that are missing or wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import vgg16
from torchvision.transforms import v2

from ddsr_core.errors import ConfigError, InputError, MissingWeightsError
from ddsr_core.imaging.images import to_float
from ddsr_core.metrics.trunks import load_trunk
from ddsr_core.pseudo_labels.embedders import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    OpenClipEmbedder,
    Vgg16Embedder,
    finish_vectors,
    prepare,
)
from tests.unit.pseudo_labels.test_embeddings import textures, tiny  # noqa: F401


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


def test_prepare_is_near_open_clips_own_preprocessing(tiny: Path) -> None:  # noqa: F811
    model, _, preprocess = open_clip.create_model_and_transforms("tiny", str(tiny))
    (image,) = textures(1, px=64)
    config = model.visual.preprocess_cfg
    actual = prepare(to_float(image), 32, config["mean"], config["std"])
    off_by = (actual[0] - preprocess(Image.fromarray(image))).abs() * torch.tensor(config["std"])[:, None, None] * 255
    assert off_by.max() < 2.5  # Pillow rounds to 8 bit between the passes and after them


def test_an_open_clip_model_from_a_file(tiny: Path) -> None:  # noqa: F811
    embedder = OpenClipEmbedder("tiny", str(tiny)).eval()
    model = open_clip.create_model("tiny", str(tiny)).eval()
    images = to_float(textures(3))
    mean, std = (torch.tensor(model.visual.preprocess_cfg[name])[:, None, None] for name in ("mean", "std"))
    with torch.inference_mode():
        torch.testing.assert_close(embedder(images), model.encode_image((images - mean) / std))
        tokens = open_clip.get_tokenizer("tiny")(["breaking waves"])
        torch.testing.assert_close(embedder.embed_texts(["breaking waves"]), model.encode_text(tokens))


def test_a_tag_trained_with_quickgelu_is_run_with_quickgelu(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    published = {"file": str(tiny), "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"openai": published})
    images = to_float(textures(1))
    quick = open_clip.create_model("tiny", str(tiny), force_quick_gelu=True).eval()
    plain = OpenClipEmbedder("tiny", str(tiny)).eval()
    tagged = OpenClipEmbedder("tiny", "openai").eval()
    with torch.inference_mode():
        torch.testing.assert_close(tagged(images), quick.encode_image(prepare(images, 32, tagged.mean, tagged.std)))
        assert (tagged(images) - plain(images)).abs().max() > 1e-4


def test_weights_that_cannot_be_downloaded_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        (
            "ViT-B-32",
            "/no/such/file.safetensors",
            MissingWeightsError,
            "'/no/such/file.safetensors' is neither",
        ),
        ("ViT-B-32", "openia", MissingWeightsError, r"one of the tags: .*openai"),
    ],
)
def test_wrong_names(model: str, weights: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OpenClipEmbedder(model, weights)


@pytest.mark.parametrize("name", ["junk.safetensors", "junk.pt", "other.safetensors"])
def test_a_file_that_is_no_such_model(tiny: Path, name: str) -> None:  # noqa: F811
    file = tiny.with_name(name)
    file.write_bytes(b"not weights")
    if name.startswith("other"):
        save_file({"visual.conv1.weight": torch.zeros(3, 3)}, file)
    with pytest.raises(InputError, match="cannot be loaded as weights of tiny"):
        OpenClipEmbedder("tiny", str(file))


@pytest.mark.parametrize(("value", "message"), [(np.nan, "not finite"), (np.inf, "not finite"), (0.0, "zero vector")])
def test_vectors_that_say_nothing_are_refused_with_the_patch(value: float, message: str) -> None:
    vectors = np.ones((3, 4), np.float32)
    vectors[1] = value
    with pytest.raises(InputError, match=message) as caught:
        finish_vectors(vectors, normalize=False, names=["a", "b", "c"])
    assert caught.value.where == "b"
