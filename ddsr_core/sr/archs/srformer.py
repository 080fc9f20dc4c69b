"""SRFormer (Zhou et al., "SRFormer: Permuted Self-Attention for Single Image Super-Resolution", ICCV 2023).

Written from the paper. The outline is that of SwinIR with two changes: *permuted self-attention*, where keys and values are
projected to a quarter of the channels and each 2x2 cell of tokens is folded into channels, so that a window of S x S
queries attends to (S/2)^2 keys of full width; and a *ConvFFN*, an MLP with a 5x5 depthwise convolution in its middle.
Stochastic depth is left out, because trainings here are short and must be reproducible. Tensors are channels-last,
``(B, H, W, C)``, which convolutions read without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Scales of each head.
HEADS = {"light": (2, 3, 4, 8), "classical": (2, 3, 4, 8), "real": (4,)}
#: Channels of the heads of the large networks.
HEAD_WIDTH = 64
RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K


def windows(x: Tensor, size: int) -> Tensor:
    """``(B, H, W, C)`` to ``(B * H/size * W/size, size * size, C)``."""
    b, h, w, c = x.shape
    x = x.view(b, h // size, size, w // size, size, c).transpose(2, 3)
    return x.reshape(-1, size * size, c)


def unwindows(x: Tensor, size: int, h: int, w: int) -> Tensor:
    """Inverse of `windows`."""
    x = x.view(-1, h // size, w // size, size, size, x.shape[-1]).transpose(2, 3)
    return x.reshape(-1, h, w, x.shape[-1])


def fold_cells(x: Tensor) -> Tensor:
    """Fold each 2x2 cell into channels: ``(B, H, W, C)`` to ``(B, H/2, W/2, 4C)``."""
    b, h, w, c = x.shape
    return x.view(b, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(b, h // 2, w // 2, 4 * c)


def relative_index(cells: int) -> Tensor:
    """Row of the bias table for each (query cell, key cell) of a window: ``(cells^2, cells^2)``."""
    axis = torch.arange(cells)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    y, x = y.flatten(), x.flatten()
    dy = y[:, None] - y[None, :] + cells - 1
    dx = x[:, None] - x[None, :] + cells - 1
    return dy * (2 * cells - 1) + dx


def shift_mask(h: int, w: int, size: int, device: torch.device) -> Tensor:
    """Attention mask of shifted windows: ``(windows, size^2, (size/2)^2)``, added to the attention, 0 or -100.

    A cyclic shift by ``size / 2`` joins regions that are apart in the image. The shift is even, so that a 2x2 cell always
    lies within one region.
    """
    regions = torch.zeros(1, h, w, 1, device=device)
    cuts = (slice(0, -size), slice(-size, -size // 2), slice(-size // 2, None))
    for number, (rows, columns) in enumerate((rows, columns) for rows in cuts for columns in cuts):
        regions[:, rows, columns] = number
    queries = windows(regions, size)
    keys = windows(regions[:, ::2, ::2], size // 2)
    return (queries != keys.transpose(1, 2)).float() * -100.0


class PermutedAttention(nn.Module):
    """Permuted self-attention in windows (section 3.2 of the paper)."""

    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.dim, self.heads, self.window = dim, heads, window
        cells = window // 2
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, dim // 4 * 2)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * cells - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_index(cells), persistent=False)

    def bias(self) -> Tensor:
        """``(heads, window^2, (window/2)^2)``; the four queries of a cell share a row."""
        cells = self.window // 2
        table = self.relative_position_bias_table[self.relative_position_index.flatten()]
        table = table.view(cells, 1, cells, 1, cells**2, self.heads).expand(-1, 2, -1, 2, -1, -1)
        return table.reshape(self.window**2, cells**2, self.heads).permute(2, 0, 1)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)  # (B*windows, heads, tokens, dim/heads)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        _, h, w, _ = x.shape
        q = self.split_heads(windows(self.q(x), self.window))
        k, v = (self.split_heads(windows(fold_cells(part), self.window // 2)) for part in self.kv(x).chunk(2, dim=-1))
        bias = self.bias()[None]
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(len(q) // len(mask), 1, 1, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        out = out.transpose(1, 2).reshape(len(q), self.window**2, self.dim)
        return self.proj(unwindows(out, self.window, h, w))


def reflect_to_multiple(x: Tensor, dim: int, multiple: int) -> Tensor:
    """Continue x behind its end by reflection, back and forth if it is short, to a multiple of that length."""
    size = x.shape[dim]
    if not torch.compiler.is_exporting() and size % multiple == 0:  # exported, sizes are not known yet
        return x
    there_and_back = max(2 * size - 2, 1)
    place = torch.arange((size + multiple - 1) // multiple * multiple, device=x.device)
    place = place % torch.full_like(place, there_and_back)  # a tensor: ONNX takes no remainder of an open size
    return x.index_select(dim, torch.minimum(place, there_and_back - place))


class ConvFFN(nn.Module):
    """MLP with a residual 5x5 depthwise convolution between its layers (section 3.3 of the paper)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 5, padding=2, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        local = self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(x + F.gelu(local))


class Block(nn.Module):
    """Attention and ConvFFN, each normalized first and added to its input; every other block shifts its windows."""

    def __init__(self, dim: int, heads: int, window: int, mlp_ratio: float, shifted: bool) -> None:
        super().__init__()
        self.shift = window // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(dim)
        self.attn = PermutedAttention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ConvFFN(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm1(x)
        if self.shift:
            y = self.attn(y.roll((-self.shift, -self.shift), (1, 2)), mask).roll((self.shift, self.shift), (1, 2))
        else:
            y = self.attn(y, None)
        x = x + y
        return x + self.mlp(self.norm2(x))


class Blocks(nn.Module):
    """Blocks in sequence, the second of each pair with shifted windows."""

    def __init__(self, dim: int, depth: int, heads: int, window: int, mlp_ratio: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, window, mlp_ratio, shifted=i % 2 == 1) for i in range(depth))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x


class ResidualGroup(nn.Module):
    """Blocks, a 3x3 convolution, and the group's input added."""

    def __init__(self, dim: int, depth: int, heads: int, window: int, mlp_ratio: float) -> None:
        super().__init__()
        self.residual_group = Blocks(dim, depth, heads, window, mlp_ratio)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.residual_group(x, mask)
        return x + self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PixelShuffleHead(nn.Sequential):
    """Upsampling of the classical form in steps of 2 or 3: ``(B, C, h, w)`` to ``(B, C, scale h, scale w)``."""

    def __init__(self, width: int, scale: int) -> None:
        factors = {2: (2,), 3: (3,), 4: (2, 2), 8: (2, 2, 2)}[scale]
        steps = ((nn.Conv2d(width, width * factor**2, 3, padding=1), nn.PixelShuffle(factor)) for factor in factors)
        super().__init__(*chain.from_iterable(steps))


class SRFormer(nn.Module):
    """Super-resolution of RGB in [0, 1]: ``(B, 3, h, w)`` to ``(B, 3, scale h, scale w)``, not clamped.

    Inputs whose sides are not multiples of the window are padded by reflection, and the output is cropped.

    Args:
        embed: token width, a multiple of 4 and of each number of heads.
        depths: blocks of each group.
        heads: attention heads of each group.
        window: window size S, in LR pixels; a multiple of 4.
        mlp_ratio: width of the ConvFFN over ``embed``.
        scale: upsampling factor.
        head: ``light`` shuffles pixels once; ``classical``, that of the large network, has `HEAD_WIDTH` channels at every
            size; ``real``, of networks for real photos (x4 only), enlarges by repetition.

    Raises:
        ValueError: a head that does not exist at that scale.
    """

    mean: Tensor

    def __init__(
        self,
        embed: int = 60,
        depths: Sequence[int] = (6, 6, 6, 6),
        heads: Sequence[int] = (6, 6, 6, 6),
        window: int = 16,
        mlp_ratio: float = 2.0,
        scale: int = 4,
        head: Literal["light", "classical", "real"] = "light",
    ) -> None:
        super().__init__()
        if head not in HEADS or scale not in HEADS[head]:
            raise ValueError(f"there is no head {head!r} for x{scale}")
        self.window, self.scale, self.head = window, scale, head
        self.register_buffer("mean", torch.tensor(RGB_MEAN).view(1, 3, 1, 1), persistent=False)
        self.conv_first = nn.Conv2d(3, embed, 3, padding=1)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(embed)})
        self.layers = nn.ModuleList(
            ResidualGroup(embed, depth, count, window, mlp_ratio) for depth, count in zip(depths, heads, strict=True)
        )
        self.norm = nn.LayerNorm(embed)
        self.conv_after_body = nn.Conv2d(embed, embed, 3, padding=1)
        if head == "light":
            self.upsample = nn.Sequential(nn.Conv2d(embed, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))
        else:
            self.conv_before_upsample = nn.Sequential(nn.Conv2d(embed, HEAD_WIDTH, 3, padding=1), nn.LeakyReLU())
            self.conv_last = nn.Conv2d(HEAD_WIDTH, 3, 3, padding=1)
        if head == "classical":
            self.upsample = PixelShuffleHead(HEAD_WIDTH, scale)
        elif head == "real":
            self.conv_up1, self.conv_up2, self.conv_hr = (nn.Conv2d(HEAD_WIDTH, HEAD_WIDTH, 3, padding=1) for _ in range(3))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        padded = reflect_to_multiple(reflect_to_multiple(x, 2, self.window), 3, self.window)
        x = self.conv_first(padded - self.mean)
        x = x + self.conv_after_body(self.body(x))
        with torch.autocast(x.device.type, enabled=False):
            x = self.enlarge(x.to(self.conv_first.weight.dtype)) + self.mean
        return x[..., : height * self.scale, : width * self.scale]

    def enlarge(self, x: Tensor) -> Tensor:
        """The head: features ``(B, C, h, w)`` to an image ``(B, 3, scale h, scale w)``."""
        if self.head == "light":
            return self.upsample(x)
        x = self.conv_before_upsample(x)
        if self.head == "classical":
            return self.conv_last(self.upsample(x))
        for convolution in (self.conv_up1, self.conv_up2):
            x = F.leaky_relu(convolution(F.interpolate(x, scale_factor=2.0, mode="nearest")), 0.2)
        return self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))

    def body(self, x: Tensor) -> Tensor:
        """The transformer: ``(B, C, H, W)`` to the same, H and W multiples of the window."""
        mask = shift_mask(x.shape[2], x.shape[3], self.window, x.device)
        x = self.patch_embed["norm"](x.permute(0, 2, 3, 1))
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x).permute(0, 3, 1, 2)


def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict from the authors' names to ours and drop their masks and indices.

    Only the names of the ConvFFN differ; `hit_srf` shares them. Any other state dict is returned unchanged.
    """
    constants = (".attn_mask", ".attn.relative_position_index", ".attn.aligned_relative_position_index")
    return {
        name.replace(".dwconv.depthwise_conv.0.", ".dwconv."): value
        for name, value in state.items()
        if not name.endswith(constants)
    }


def public_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an `SRFormer`'s state dict to the authors' names, and add the masks and indices that their class loads.

    Both are integers, stored in the smallest type; the masks are for images of 2 x 2 windows.
    """
    public = with_public_convffn(state)
    for name, table in state.items():
        block, found, _ = name.rpartition("attn.relative_position_bias_table")
        if not found:
            continue
        cells = (math.isqrt(len(table)) + 1) // 2
        index = relative_index(cells).view(cells, 1, cells, 1, cells**2).expand(-1, 2, -1, 2, -1)
        public[f"{block}attn.aligned_relative_position_index"] = index.reshape(4 * cells**2, cells**2).short()
        if int(block.split(".")[-2]) % 2:
            size = 2 * cells
            public[f"{block}attn_mask"] = shift_mask(2 * size, 2 * size, size, table.device).char()
    return public


def with_public_convffn(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of each `ConvFFN` to the authors' names."""
    return {name.replace(".dwconv.", ".dwconv.depthwise_conv.0."): value for name, value in state.items()}


def srformer_kwargs(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Arguments of the `SRFormer` that a state dict (`own_names`) belongs to, or None if it belongs to another network."""
    first = "layers.0.residual_group.blocks.0."
    needed = ("conv_first.weight", first + "attn.kv.weight", first + "mlp.dwconv.weight")
    head = _head_of(state)
    if head is None or not all(name in state for name in needed):
        return None
    embed = state["conv_first.weight"].shape[0]
    places = [name.split(".") for name in state if name.endswith(".attn.relative_position_bias_table")]
    depths = [0] * (1 + max(int(place[1]) for place in places))
    for place in places:
        depths[int(place[1])] += 1
    tables = [state[f"layers.{i}.residual_group.blocks.0.attn.relative_position_bias_table"] for i in range(len(depths))]
    return {
        "embed": embed,
        "depths": depths,
        "heads": [table.shape[1] for table in tables],
        "window": int(tables[0].shape[0] ** 0.5) + 1,
        "mlp_ratio": state[first + "mlp.fc1.weight"].shape[0] / embed,
        "scale": head[1],
        "head": head[0],
    }


def _head_of(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """Head and scale, or None."""
    if "conv_up2.weight" in state and "conv_hr.weight" in state:
        return "real", 4
    if "upsample.0.weight" not in state:
        return None
    if "conv_last.weight" not in state:
        return "light", math.isqrt(state["upsample.0.weight"].shape[0] // 3)
    steps = [value.shape for name, value in state.items() if name.startswith("upsample.") and name.endswith(".weight")]
    return "classical", math.prod(math.isqrt(out // width) for out, width, *_ in steps)
