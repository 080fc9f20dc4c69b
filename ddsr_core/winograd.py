"""Convolutions in fewer multiplications: the Winograd (Cook-Toom) form of a small kernel with stride 1.

A 4x4 square of outputs of a 3x3 kernel takes 36 products instead of 144, of a 5x5 kernel 64 instead of 400. On a CPU
PyTorch has no such kernels for float32, and the metrics that look through AlexNet or VGG spend most of their time in
those convolutions. Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Outputs a side of a tile.
_TILE = 4
#: Where the products of polynomials are sampled, beside infinity: small numbers of small rounding error.
_POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)
#: Kernels that gain: with fewer input channels the transforms cost more than they save.
_KERNELS = (3, 5)
_LEAST_CHANNELS = 16
#: Tiles transformed at a time: what they take stays in the processor's cache, and memory stays small for large images.
_TILES_AT_ONCE = 160


class Transforms(NamedTuple):
    """Matrices of F(m, r): ``m`` outputs of an ``r``-tap filter from ``n = m + r - 1`` inputs, float64.

    ``outputs`` (m, n), ``kernel`` (n, r), ``inputs`` (n, n): the outputs are
    ``outputs @ ((kernel @ taps) * (inputs @ samples))``.
    """

    outputs: np.ndarray
    kernel: np.ndarray
    inputs: np.ndarray


def transforms(m: int, r: int) -> Transforms:
    """The matrices of F(m, r) for r = 3 or 5 and m = 4 (any whose n - 1 sample points are at most seven)."""
    n = m + r - 1
    points = np.array(_POINTS[: n - 1])
    others = [np.delete(points, j) for j in range(n - 1)]
    scale = np.array([np.prod(points[j] - others[j]) for j in range(n - 1)])
    outputs = np.vstack([np.vander(points, m, increasing=True), np.eye(m)[-1]]).T
    kernel = np.vstack([np.vander(points, r, increasing=True) / scale[:, None], np.eye(r)[-1]])
    inputs = np.zeros((n, n))
    for j in range(n - 1):
        inputs[j, : n - 1] = np.poly(others[j])[::-1]
    inputs[-1] = np.poly(points)[::-1]
    return Transforms(outputs, kernel, inputs)


def fits(conv: nn.Conv2d) -> bool:
    """Whether `WinogradConv2d` can stand for a convolution, and gains."""
    return (
        _is_plain(conv) and conv.kernel_size[0] in _KERNELS and conv.stride == (1, 1) and conv.in_channels >= _LEAST_CHANNELS
    )


def _is_plain(conv: nn.Conv2d) -> bool:
    """Square, zero-padded alike on all sides, one group, no gaps."""
    sides = {conv.kernel_size, conv.stride, conv.dilation, conv.padding}
    return (
        all(isinstance(side, tuple) and len(set(side)) == 1 for side in sides)
        and (conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), 1, "zeros")
    )  # fmt: skip


class WinogradConv2d(nn.Module):
    """A frozen convolution, equal to PyTorch's within float32 rounding (about 1e-6 of the largest output).

    Args:
        conv: one that `fits`; its weights are copied.
    """

    kernel: Tensor
    bias: Tensor
    inputs: Tensor
    outputs: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        side = conv.kernel_size[0]
        self.padding, self.window = int(conv.padding[0]), _TILE + side - 1
        t = transforms(_TILE, side)
        weight = conv.weight.detach().double().cpu().numpy()
        kernel = np.einsum("ai,oxij,bj->abxo", t.kernel, weight, t.kernel)
        tables = {
            "kernel": kernel.reshape(self.window**2, conv.in_channels, conv.out_channels),
            "inputs": t.inputs,
            "outputs": t.outputs,
            "bias": np.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().cpu().numpy(),
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(table, np.float32)))

    def forward(self, x: Tensor) -> Tensor:
        """float32 (B, C, H, W) to (B, C', H', W') in channels_last."""
        batch, _, height, width = x.shape
        grow = 2 * self.padding + _TILE - self.window
        rows, columns = -(-(height + grow) // _TILE), -(-(width + grow) // _TILE)
        below, right = (count * _TILE + self.window - _TILE for count in (rows, columns))
        edges = (0, 0, self.padding, right - width - self.padding, self.padding, below - height - self.padding)
        padded = F.pad(x.permute(0, 2, 3, 1), edges)  # B, H, W, C
        tiles = padded.unfold(1, self.window, _TILE).unfold(2, self.window, _TILE)  # B, rows, columns, C, n, n
        result = x.new_empty(batch, rows, _TILE, columns, _TILE, self.bias.numel())
        strip = max(1, _TILES_AT_ONCE // columns)
        for image in range(batch):
            for top in range(0, rows, strip):
                done = self._strip(tiles[image, top : top + strip])
                result[image, top : top + strip] = done.permute(2, 0, 3, 1, 4)
        whole = result.view(batch, rows * _TILE, columns * _TILE, -1)
        return whole[:, : height + grow, : width + grow].permute(0, 3, 1, 2)

    def _strip(self, tiles: Tensor) -> Tensor:
        """(rows, columns, C, n, n) inputs to (m, m, rows, columns, C') outputs."""
        rows, columns, channels = tiles.shape[:3]
        samples = _both_ways(self.inputs, tiles.permute(3, 4, 0, 1, 2).reshape(self.window, self.window, -1))
        products = torch.bmm(samples.view(self.window**2, rows * columns, channels), self.kernel)
        result = _both_ways(self.outputs, products.view(self.window, self.window, -1))
        return result.view(_TILE, _TILE, rows, columns, -1).add_(self.bias)


def _both_ways(matrix: Tensor, squares: Tensor) -> Tensor:
    """``matrix @ square @ matrix.T`` of each of N squares: (a, b), (b, b, N) -> (a, a, N)."""
    side, count = squares.shape[1:]
    rows = (matrix @ squares.view(side, side * count)).view(-1, side, count)
    return torch.bmm(matrix.expand(len(rows), -1, -1), rows)


class FoldedConv2d(nn.Module):
    """A frozen strided convolution, such as AlexNet's first, as a `WinogradConv2d` on squares folded into channels.

    Args:
        conv: one that `folds`; its weights are copied.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.stride, self.kernel_px, self.padding = conv.stride[0], conv.kernel_size[0], int(conv.padding[0])
        blocks = -(-self.kernel_px // self.stride)
        spare = blocks * self.stride - self.kernel_px
        with torch.device("meta"):
            folded = nn.Conv2d(conv.in_channels * self.stride**2, conv.out_channels, blocks)
        weight = F.pixel_unshuffle(F.pad(conv.weight.detach(), (0, spare, 0, spare)), self.stride)
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        folded.load_state_dict({"weight": weight, "bias": bias}, assign=True)
        self.folded, self.blocks = WinogradConv2d(folded), blocks

    def forward(self, x: Tensor) -> Tensor:
        """float32 (B, C, H, W) to (B, C', H', W') in channels_last."""
        ends = []
        for size in (x.shape[3], x.shape[2]):
            outputs = (size + 2 * self.padding - self.kernel_px) // self.stride + 1
            ends.append((outputs + self.blocks - 1) * self.stride - size - self.padding)  # below 0: cut off
        padded = F.pad(x, (self.padding, ends[0], self.padding, ends[1]))
        result: Tensor = self.folded(F.pixel_unshuffle(padded, self.stride))
        return result


def folds(conv: nn.Conv2d) -> bool:
    """Whether `FoldedConv2d` can stand for a convolution, and gains."""
    stride, blocks = conv.stride[0], -(-conv.kernel_size[0] // conv.stride[0])
    return _is_plain(conv) and stride > 1 and blocks in _KERNELS and conv.in_channels * stride**2 >= _LEAST_CHANNELS


def accelerate(module: nn.Module) -> nn.Module:
    """Replace every convolution below ``module`` that `fits` or `folds`; returns ``module``."""
    for name, child in module.named_children():
        if not isinstance(child, nn.Conv2d):
            accelerate(child)
        elif fits(child):
            setattr(module, name, WinogradConv2d(child))
        elif folds(child):
            setattr(module, name, FoldedConv2d(child))
    return module
