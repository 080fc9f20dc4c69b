"""The two decoders of the paper's models in plain PyTorch with random weights, for timing without diffusers.

Shapes and operations are those of TAESD and of Stable Diffusion 1's VAE (``AutoencoderTiny`` and ``AutoencoderKL`` of
diffusers with their published configs); tests/unit/test_benchmarks.py checks this.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TinyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.convs
        return F.relu(third(F.relu(second(F.relu(first(x))))) + x)


class TinyDecoder(nn.Module):
    """TAESD's decoder: latents ``(B, 4, h, w)`` to images ``(B, 3, 8h, 8w)``; width 64."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(4, width, 3, padding=1), nn.ReLU()]
        for _ in range(3):
            layers += [TinyBlock(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        layers += [TinyBlock(width), nn.Conv2d(width, 3, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        return 2 * self.layers(3 * torch.tanh(latents / 3)) - 1


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inputs, eps=1e-6), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, outputs, eps=1e-6), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(branch)))


class SpatialAttention(nn.Module):
    """One head over all positions."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, N, C)
        q, k, v = (layer(tokens)[:, None] for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.out(attended).transpose(1, 2).reshape(x.shape)


class SdDecoder(nn.Module):
    """Stable Diffusion's VAE decoder: unscaled latents ``(B, 4, h, w)`` to images ``(B, 3, 8h, 8w)``; width 128."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        groups, top = min(32, width), 4 * width
        middle = [ResidualBlock(top, top, groups), SpatialAttention(top, groups), ResidualBlock(top, top, groups)]
        layers: list[nn.Module] = [nn.Conv2d(4, 4, 1), nn.Conv2d(4, top, 3, padding=1), *middle]
        inputs = top
        for level, outputs in enumerate((top, top, 2 * width, width)):
            layers += [ResidualBlock(inputs if first else outputs, outputs, groups) for first in (True, False, False)]
            if level < 3:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(outputs, outputs, 3, padding=1)]
            inputs = outputs
        layers += [nn.GroupNorm(groups, width, eps=1e-6), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        images: Tensor = self.layers(latents)
        return images
