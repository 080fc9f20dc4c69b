"""The networks that describe an image by a vector: open_clip's models, and the VGG16 of `ddsr_core.metrics.trunks`.

Each takes ``float32 (B, 3, H, W)`` in [0, 1] of any size, crops what is not square to its center, and gives ``float32
(B, d)``, not normalized. On a GPU they compute in bfloat16, elsewhere in float32.
"""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from ddsr_core.errors import ConfigError, InputError, MissingWeightsError
from ddsr_core.metrics.trunks import load_trunk

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
OFFLINE = "or set embeddings.backend=vgg16, which needs no model hub"


def prepare(images: Tensor, side_px: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Center crop to a square, scale to ``side_px`` (bicubic, antialiased), standardise each channel."""
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
        image_px: height and width that images are scaled to; 224 is what the network was trained on.

    Raises:
        MissingWeightsError: the trunk is not installed.
    """

    def __init__(self, image_px: int = 224) -> None:
        from torchvision.models import vgg16

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
    """Projected image embedding of an open_clip model, with the text tower beside it.

    Args:
        name: architecture that open_clip knows.
        weights: a tag that open_clip knows for it, or the path of a file.

    Raises:
        ConfigError: open_clip has no such architecture.
        MissingWeightsError: neither such a tag nor such a file, or the tag's file cannot be fetched.
        InputError: the file does not hold that architecture's weights.
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
        """``float32 (len(texts), d)`` in the space of the images.

        Raises:
            MissingWeightsError: the model's tokenizer has to be fetched and cannot be.
        """
        import open_clip

        try:
            tokens = open_clip.get_tokenizer(self.name)(texts)
        except (OSError, RuntimeError) as error:
            raise MissingWeightsError(
                f"the tokenizer of {self.name} cannot be fetched: {_first_line(error)}",
                where="embeddings.model",
                fix="run once with a network, or use a model with open_clip's own tokenizer, such as ViT-B-32",
            ) from error
        tokens = tokens.to(next(self.model.parameters()).device)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
            vectors: Tensor = self.model.encode_text(tokens)
        return vectors.float()


def _create(name: str, weights: str) -> Any:
    import open_clip

    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        raise ConfigError(
            f"open_clip has no model {name!r}",
            where="embeddings.model",
            fix=f"such as: {', '.join(near or ['ViT-B-32', 'ViT-L-14'])}",
        )
    file = Path(weights).expanduser()
    if file.is_file():
        return _from_file(name, file)
    published = open_clip.get_pretrained_cfg(name, weights)
    if not published:
        tags = sorted(tag for model, tag in open_clip.list_pretrained() if model == name)
        raise MissingWeightsError(
            f"there is no file {weights!r}, and open_clip knows no such weights of {name}",
            where="embeddings.weights",
            fix=f"give the path of a weights file, or one of: {', '.join(tags) or 'none is published'}",
        )
    try:  # models of the first CLIP release were trained with QuickGELU; with plain GELU their features are wrong
        return open_clip.create_model(
            name, weights, force_quick_gelu=bool(published.get("quick_gelu")), require_pretrained=True
        )
    except (OSError, RuntimeError) as error:
        raise _cannot_fetch(name, weights, published, error) from error


def _from_file(name: str, file: Path) -> Any:
    import open_clip

    try:
        return open_clip.create_model(name, str(file), require_pretrained=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, AttributeError,
            pickle.UnpicklingError, SafetensorError) as error:  # fmt: skip
        raise InputError(
            f"the file cannot be loaded as weights of {name}: {_first_line(error)}",
            where=file,
            fix="set embeddings.model to the architecture that the file belongs to",
        ) from error


def _cannot_fetch(name: str, tag: str, published: dict[str, Any], error: Exception) -> MissingWeightsError:
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME

    folder, _, file = (published.get("hf_hub") or published.get("url") or "").rpartition("/")
    bring = f"bring {file or HF_SAFE_WEIGHTS_NAME} of {folder}" if published.get("hf_hub") else f"bring {file}"
    model = f"{name}-quickgelu" if published.get("quick_gelu") and not name.endswith("-quickgelu") else name
    return MissingWeightsError(
        f"the weights {tag!r} of {name} are not on this machine and cannot be fetched: {_first_line(error)}",
        where="embeddings.weights",
        fix=f"{bring} and set embeddings.weights=/path/to/it embeddings.model={model}, {OFFLINE}",
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
