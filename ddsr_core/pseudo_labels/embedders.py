"""Networks that turn an image into a feature vector: the models of open_clip, and VGG16 (`ddsr_core.metrics.trunks`).

Each takes ``float32 (B, 3, H, W)`` in [0, 1] of any size, crops it to its center square, and returns ``float32 (B, d)``,
not normalized. On a GPU they compute in bfloat16, elsewhere in float32.
"""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import open_clip
import torch
from open_clip.constants import HF_SAFE_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import vgg16

from ddsr_core.errors import ConfigError, InputError, MissingWeightsError
from ddsr_core.factories import load_factory
from ddsr_core.imaging.images import to_float
from ddsr_core.metrics.trunks import load_trunk
from ddsr_core.pseudo_labels.config import EmbeddingsConfig
from ddsr_core.pseudo_labels.names import EMBEDDERS

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
OFFLINE = "or set embeddings.backend=vgg16, which needs no download"


def prepare(images: Tensor, side_px: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Center crop to a square, scale to ``side_px`` (bicubic, antialiased), standardize each channel."""
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    x = images[:, :, top : top + side, left : left + side]
    if side != side_px:
        x = F.interpolate(x, size=(side_px, side_px), mode="bicubic", antialias=True).clamp(0, 1)
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]


class Vgg16Embedder(nn.Module):
    """Average-pooled conv5_3 of VGG16, after its ReLU: d = 512.

    Args:
        image_px: height and width that images are scaled to; the network was trained on 224.

    Raises:
        MissingWeightsError: the trunk is not installed.
    """

    def __init__(self, image_px: int = 224) -> None:
        super().__init__()
        self.image_px = image_px
        with torch.device("meta"):
            self.features = vgg16(init_weights=False).features[:30]
        trunk = {name.removeprefix("features."): value for name, value in load_trunk("vgg16").items()}
        self.features.load_state_dict(trunk, assign=True)

    def forward(self, images: Tensor) -> Tensor:
        x = prepare(images, self.image_px, IMAGENET_MEAN, IMAGENET_STD)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            maps: Tensor = self.features(x.contiguous(memory_format=torch.channels_last))  # (B, 512, px/16, px/16)
        return maps.float().mean((2, 3))


class OpenClipEmbedder(nn.Module):
    """The image embedding of an open_clip model, and its text embedding.

    Args:
        name: architecture, by its name in open_clip.
        weights: a tag that open_clip has for the architecture, or the path of a file.

    Raises:
        ConfigError: open_clip has no such architecture.
        MissingWeightsError: there is neither such a tag nor such a file, or the file of the tag cannot be downloaded.
        InputError: the file does not contain weights of the architecture.
    """

    def __init__(self, name: str, weights: str) -> None:
        super().__init__()
        self.name = name
        self.model = _create(name, weights)
        preprocessing = self.model.visual.preprocess_cfg
        size = preprocessing["size"]
        self.image_px = int(size if isinstance(size, int) else size[0])
        self.mean, self.std = preprocessing["mean"], preprocessing["std"]

    def forward(self, images: Tensor) -> Tensor:
        x = prepare(images, self.image_px, self.mean, self.std)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            vectors: Tensor = self.model.encode_image(x)
        return vectors.float()

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Embed texts: ``float32 (len(texts), d)``, comparable with the vectors of images.

        Raises:
            MissingWeightsError: the model's tokenizer cannot be downloaded.
        """
        try:
            tokens = open_clip.get_tokenizer(self.name)(texts)
        except (OSError, RuntimeError) as error:
            raise MissingWeightsError(
                f"the tokenizer of {self.name} cannot be downloaded: {_first_line(error)}",
                where="embeddings.model",
                fix="run once with network access, or use a model with open_clip's own tokenizer, such as ViT-B-32",
            ) from error
        tokens = tokens.to(next(self.model.parameters()).device)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
            vectors: Tensor = self.model.encode_text(tokens)
        return vectors.float()


def _create(name: str, weights: str) -> Any:
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        raise ConfigError(
            f"open_clip has no model {name!r}",
            where="embeddings.model",
            fix=f"use for example {', '.join(near or ['ViT-B-32', 'ViT-L-14'])}",
        )
    file = Path(weights).expanduser()
    if file.is_file():
        return _from_file(name, file)
    published = open_clip.get_pretrained_cfg(name, weights)
    if not published:
        tags = sorted(tag for model, tag in open_clip.list_pretrained() if model == name)
        raise MissingWeightsError(
            f"{weights!r} is neither a file nor a tag of open_clip for {name}",
            where="embeddings.weights",
            fix=f"give the path of a weights file, or one of the tags: {', '.join(tags) or 'none is published'}",
        )
    try:  # the models of the first CLIP release were trained with QuickGELU; with GELU their features are wrong
        return open_clip.create_model(
            name, weights, force_quick_gelu=bool(published.get("quick_gelu")), require_pretrained=True
        )
    except (OSError, RuntimeError) as error:
        raise _cannot_download(name, weights, published, error) from error


def _from_file(name: str, file: Path) -> Any:
    try:
        return open_clip.create_model(name, str(file), require_pretrained=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, AttributeError,
            pickle.UnpicklingError, SafetensorError) as error:  # fmt: skip
        raise InputError(
            f"the file cannot be loaded as weights of {name}: {_first_line(error)}",
            where=file,
            fix="set embeddings.model to the architecture of the file",
        ) from error


def _cannot_download(name: str, tag: str, published: dict[str, Any], error: Exception) -> MissingWeightsError:
    folder, _, file = (published.get("hf_hub") or published.get("url") or "").rpartition("/")
    download = f"download {file or HF_SAFE_WEIGHTS_NAME} of {folder}" if published.get("hf_hub") else f"download {file}"
    model = f"{name}-quickgelu" if published.get("quick_gelu") and not name.endswith("-quickgelu") else name
    return MissingWeightsError(
        f"the weights {tag!r} of {name} are not on this machine and cannot be downloaded: {_first_line(error)}",
        where="embeddings.weights",
        fix=f"{download} and set embeddings.weights=/path/to/it embeddings.model={model}, {OFFLINE}",
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@runtime_checkable
class EmbedsTexts(Protocol):
    """What a network has in addition if `ddsr_core.pseudo_labels.names.EMBEDDERS` says that it embeds texts."""

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Embed texts: ``float32 (len(texts), d)``, comparable with the vectors of images."""
        ...


def vgg16_embedder(config: EmbeddingsConfig, weights: Path | None) -> Vgg16Embedder:
    """The entry of ``vgg16``, whose weights are those of the installed trunk."""
    return Vgg16Embedder(config.image_px)


def open_clip_embedder(config: EmbeddingsConfig, weights: Path | None) -> OpenClipEmbedder:
    """The entry of ``open_clip``: weights of the file, or of ``config.weights``."""
    return OpenClipEmbedder(config.model, str(weights or config.weights))


def load_embedder(config: EmbeddingsConfig, device: str = "cpu", weights: Path | None = None) -> nn.Module:
    """The network of a config, ready for inference.

    Args:
        config: names the network.
        device: torch device.
        weights: a weights file to use in place of ``config.weights``.

    Raises:
        ConfigError: the architecture is unknown.
        MissingWeightsError: the weights are neither on this machine nor downloadable; the message says what to download.
        InputError: the weights belong to another architecture.
    """
    embedder: nn.Module = load_factory(EMBEDDERS[config.backend].factory, "embeddings.backend")(config, weights)
    embedder.eval().requires_grad_(False).to(device)
    embedder.to(memory_format=torch.channels_last)  # faster convolutions on CPUs and GPUs
    return embedder


def embed_images(images: np.ndarray, embedder: nn.Module, config: EmbeddingsConfig, names: Sequence[str]) -> np.ndarray:
    """Embed a batch of images.

    Args:
        images: ``uint8 (B, H, W, 3)``.
        embedder: the network.
        config: whether to normalize.
        names: of the images, for messages.

    Returns:
        ``float32 (B, d)``, of length 1 if ``config.normalize``.

    Raises:
        InputError: a vector is zero or not finite; the image is named.
    """
    with torch.inference_mode():
        device = next(chain(embedder.parameters(), embedder.buffers(), [torch.empty(0)])).device
        vectors = embedder(to_float(images, device)).cpu().numpy()
    return finish_vectors(vectors, config.normalize, names)


def finish_vectors(vectors: np.ndarray, normalize: bool, names: Sequence[str]) -> np.ndarray:
    """Check vectors ``(B, d)`` and scale them to length 1 if ``normalize``.

    Raises:
        InputError: a vector is zero or not finite.
    """
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(lengths[:, 0]) | (lengths[:, 0] == 0))
    if len(bad):
        kind = "a zero vector" if lengths[bad[0], 0] == 0 else "a vector that is not finite"
        raise InputError(
            f"the feature network returns {kind} for {len(bad)} of {len(vectors)} images of a batch",
            where=names[int(bad[0])],
            fix="check that embeddings.weights belongs to embeddings.model, or set embeddings.backend=vgg16",
        )
    return np.ascontiguousarray(vectors / lengths if normalize else vectors, dtype=np.float32)


def embed_batch(images: np.ndarray, embedder: nn.Module, config: EmbeddingsConfig, names: Sequence[str]) -> np.ndarray:
    """`embed_images` in a batch that is padded to the size in the config.

    Kernels depend on the batch size, and the last bits of a vector must not depend on how many patches are embedded with
    it.
    """
    padding = config.batch_size - len(images)
    padded = np.concatenate([images, np.repeat(images[-1:], padding, axis=0)]) if padding else images
    return embed_images(padded, embedder, config, [*names, *[names[-1]] * padding])[: len(images)]
