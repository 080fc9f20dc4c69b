"""HiT-SRF (Zhang et al., "HiT-SR: Hierarchical Transformer for Efficient Image Super-Resolution", ECCV 2024).

Written from the paper. Weights are named as in the authors' files. The windows grow from block to block of a group. In a
window of S x S tokens, *spatial-channel correlation* replaces attention: one half of the channels correlates every token
with at most 8 x 8 cells of tokens, the other half correlates channels with channels, both without a softmax.
Tensors are channels-last, ``(B, H, W, C)``.

Two computations differ from the equations as printed, with equal results:

- The position bias of a cell is the mean of the biases of its tokens. It is pooled on the map of relative positions,
  ``(2S - 1)^2`` values, and read at ``S^2 * 64`` places, where the equation builds ``S^4``.
- Without a softmax, ``(q v^T / d + bias) v`` is ``q (v^T v) / d + bias v``: the ``S^2 x 64`` correlations of each window
  and head are never made, and heads are blocks on the diagonal of ``v^T v``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddsr_core.sr.archs.srformer import RGB_MEAN, ConvFFN, reflect_to_multiple, unwindows, windows

BASE_WINDOW = 8
WINDOWS = (4, 8, 16, 32, 48, 64)


class DualFeatures(nn.Module):
    """Dual feature extraction: a convolutional branch times a linear one, ``(B, C, H, W)`` to the same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        narrow = dim // 5
        self.conv = nn.Sequential(
            nn.Conv2d(dim, narrow, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(narrow, narrow, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(narrow, dim, 1),
        )
        self.linear = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.linear(x)


class PositionBias(nn.Module):
    """Dynamic position bias of each (token, cell) of a window: an MLP on their distance, averaged over the cell."""

    offsets: Tensor

    def __init__(self, dim: int, heads: int, window: int, cells: int) -> None:
        super().__init__()
        self.window, self.cell = window, window // cells
        width = dim // 4
        self.pos_proj = nn.Linear(2, width)
        self.pos1 = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))
        self.pos2 = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))
        self.pos3 = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, heads))
        axis = torch.arange(1.0 - window, window)
        self.register_buffer("offsets", torch.cartesian_prod(axis, axis).view(len(axis), len(axis), 2), persistent=False)

    def forward(self) -> Tensor:
        """``(heads, window^2, cells^2)``."""
        of_distance = self.pos3(self.pos2(self.pos1(self.pos_proj(self.offsets)))).permute(2, 0, 1)
        pooled = F.avg_pool2d(of_distance, self.cell, stride=1)
        # Cell j begins behind cell 0 by j cells, so its distances to the tokens begin earlier in the map.
        bias = pooled.unfold(1, self.window, self.cell).unfold(2, self.window, self.cell).flip(1, 2)
        return bias.flatten(3, 4).flatten(1, 2).transpose(1, 2)


class Correlation(nn.Module):
    """Spatial-channel correlation in windows (section 3.3 of the paper): ``(B, H, W, C)`` to the same.

    Height and width are multiples of the window.
    """

    same_head: Tensor

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.cells = min(window, BASE_WINDOW)
        self.qv = DualFeatures(dim)
        self.proj = nn.Linear(dim, dim)
        self.spatial_linear = nn.Linear((window // self.cells) ** 2, 1)
        self.pos = PositionBias(dim // 4, heads, window, self.cells)
        head = torch.arange(dim // 2) // (dim // 2 // heads)
        self.register_buffer("same_head", (head[:, None] == head[None, :]).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, c = x.shape
        qv = self.qv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        pooled = windows(self.pool(qv[..., c // 2 :]), self.cells)
        q, v = windows(qv, self.window).chunk(2, dim=-1)
        out = torch.cat((self.spatial(q, pooled), self.channel(q, v)), dim=-1)
        return self.proj(unwindows(out, self.window, h, w))

    def pool(self, v: Tensor) -> Tensor:
        """Each cell to one token, by a learned linear form: ``(B, H, W, C/2)`` to ``(B, H/cell, W/cell, C/2)``."""
        b, h, w, c = v.shape
        cell = self.window // self.cells
        v = v.reshape(b, h // cell, cell, w // cell, cell, c)
        return torch.einsum("bhiwjc,ij->bhwc", v, self.spatial_linear.weight.view(cell, cell)) + self.spatial_linear.bias

    def spatial(self, q: Tensor, pooled: Tensor) -> Tensor:
        """Tokens with the cells of their window: ``(n, S^2, C/2)`` and ``(n, cells^2, C/2)`` to ``(n, S^2, C/2)``."""
        head_dim = q.shape[-1] // self.heads
        gram = pooled.transpose(1, 2) @ pooled * (self.same_head / head_dim)
        by_head = pooled.unflatten(-1, (self.heads, head_dim))
        by_position = torch.einsum("hlm,nmhd->nlhd", self.pos().to(q.dtype), by_head).flatten(2)
        return q @ gram.to(q.dtype) + by_position

    def channel(self, q: Tensor, v: Tensor) -> Tensor:
        """Channels with channels: ``(n, S^2, C/2)`` twice, to the same."""
        return v @ (v.transpose(1, 2) @ q / self.window**2)


class Block(nn.Module):
    """Correlation and ConvFFN, each followed by normalization and added to its input."""

    def __init__(self, dim: int, heads: int, window: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.correlation = Correlation(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ConvFFN(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        padded = reflect_to_multiple(reflect_to_multiple(x, 1, self.correlation.window), 2, self.correlation.window)
        x = x + self.norm1(self.correlation(padded)[:, :h, :w])
        return x + self.norm2(self.mlp(x))


class Blocks(nn.Module):
    """Blocks in sequence with growing windows."""

    def __init__(self, dim: int, heads: int, sizes: Sequence[int], mlp_ratio: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, size, mlp_ratio) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class ResidualGroup(nn.Module):
    """Blocks, a 3x3 convolution, and the group's input added."""

    def __init__(self, dim: int, heads: int, sizes: Sequence[int], mlp_ratio: float) -> None:
        super().__init__()
        self.residual_group = Blocks(dim, heads, sizes, mlp_ratio)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.residual_group(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class HiTSRF(nn.Module):
    """Super-resolution of RGB in [0, 1]: ``(B, 3, h, w)`` to ``(B, 3, scale h, scale w)``, not clamped.

    Args:
        embed: token width. Half of it must be a multiple of each number of heads.
        heads: heads of the spatial correlation, for each group.
        window_px: window size S of each block of a group, in LR pixels; at most 8 or a multiple of 8.
        mlp_ratio: width of the ConvFFN over ``embed``.
        scale: upsampling factor.

    Raises:
        ValueError: widths or windows that do not divide evenly.
    """

    mean: Tensor

    def __init__(
        self,
        embed: int = 60,
        heads: Sequence[int] = (6, 6, 6, 6),
        window_px: Sequence[int] = WINDOWS,
        mlp_ratio: float = 2.0,
        scale: int = 4,
    ) -> None:
        super().__init__()
        if any(embed % (2 * count) for count in heads) or embed < 32:
            raise ValueError(f"embed {embed} must be a multiple of twice each of heads {list(heads)}, and 32 at least")
        if any(size > BASE_WINDOW and size % BASE_WINDOW for size in window_px):
            raise ValueError(f"windows {list(window_px)} above {BASE_WINDOW} must be multiples of it")
        self.scale = scale
        self.register_buffer("mean", torch.tensor(RGB_MEAN).view(1, 3, 1, 1), persistent=False)
        self.conv_first = nn.Conv2d(3, embed, 3, padding=1)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(embed)})
        self.layers = nn.ModuleList(ResidualGroup(embed, count, window_px, mlp_ratio) for count in heads)
        self.norm = nn.LayerNorm(embed)
        self.conv_after_body = nn.Conv2d(embed, embed, 3, padding=1)
        self.upsample = nn.Sequential(nn.Conv2d(embed, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_first(x - self.mean)
        x = x + self.conv_after_body(self.body(x))
        with torch.autocast(x.device.type, enabled=False):
            return self.upsample(x.to(self.conv_first.weight.dtype)) + self.mean

    def body(self, x: Tensor) -> Tensor:
        """The transformer: ``(B, C, H, W)`` to the same."""
        x = self.patch_embed["norm"](x.permute(0, 2, 3, 1))
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).permute(0, 3, 1, 2)


def hit_srf_kwargs(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Arguments of the `HiTSRF` that a state dict (`srformer.own_names`) belongs to, or None for another network.

    Windows of 8 and less cannot be told apart in the weights: if a group starts with two of them, they are taken as 4 and 8.
    """
    first = "layers.0.residual_group.blocks.0."
    needed = (
        "conv_first.weight",
        first + "correlation.spatial_linear.weight",
        first + "mlp.dwconv.weight",
        "upsample.0.weight",
    )
    if not all(name in state for name in needed):
        return None
    embed = state["conv_first.weight"].shape[0]
    groups = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    linear = re.compile(r"layers\.0\.residual_group\.blocks\.(\d+)\.correlation\.spatial_linear\.weight")
    found = sorted((int(match[1]), value.shape[1]) for name, value in state.items() if (match := linear.fullmatch(name)))
    sizes = [round(tokens**0.5) * BASE_WINDOW for _, tokens in found]
    if sizes[:2] == [BASE_WINDOW, BASE_WINDOW]:
        sizes[0] = BASE_WINDOW // 2
    return {
        "embed": embed,
        "heads": [
            state[f"layers.{i}.residual_group.blocks.0.correlation.pos.pos3.2.weight"].shape[0] for i in range(groups)
        ],
        "window_px": sizes,
        "mlp_ratio": state[first + "mlp.fc1.weight"].shape[0] / embed,
        "scale": round((state["upsample.0.weight"].shape[0] / 3) ** 0.5),
    }
