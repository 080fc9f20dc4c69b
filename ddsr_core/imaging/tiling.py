"""Run an SR network, or the decoder of a VAE, on images of any size, in overlapping tiles where necessary."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddsr_core.errors import InputError
from ddsr_core.metrics.psnr_ssim import full_precision


@torch.inference_mode()
def enlarge(
    network: Callable[[Tensor], Tensor],
    lr: Tensor,
    *,
    scale: int,
    tile_px: int = 0,
    overlap_px: int = 48,
    on_tile: Callable[[], object] = lambda: None,
) -> Tensor:
    """Run ``network`` on ``lr`` in float32, in tiles if the image has more than ``tile_px`` squared pixels.

    The outer ``overlap_px`` of a tile are computed and discarded, so that a network whose receptive field reaches no
    further gives the same pixels as without tiles. All tiles have the same size; the last ones are moved inwards.

    Args:
        network: maps (B, 3, h, w) in [0, 1], or latents (B, C, h, w), to (B, 3, h * scale, w * scale).
        lr: float32 (B, 3, h, w) in [0, 1], or latents (B, C, h, w).
        scale: enlargement of the network.
        tile_px: side of a tile in LR pixels; 0 never tiles.
        overlap_px: LR pixels that are discarded at each inner edge of a tile; less than half of ``tile_px``.
        on_tile: called after each forward pass.

    Returns:
        (B, 3, h * scale, w * scale) on the device of ``lr``, not clamped or rounded.

    Raises:
        InputError: the network's output has another size or is not finite, or the memory of the device is too small.
    """
    height, width = lr.shape[-2:]
    if tile_px <= 0 or height * width <= tile_px**2:
        sr = _forward(network, lr, scale)
        on_tile()
        return sr
    if overlap_px * 2 >= tile_px:
        raise InputError(
            f"tiles of {tile_px} px with {overlap_px} px of overlap leave nothing",
            fix=f"use tiles of more than {2 * overlap_px} LR px",
        )
    sr = lr.new_empty(len(lr), 3, height * scale, width * scale)
    for top, rows in _spans(height, tile_px, overlap_px):
        for left, columns in _spans(width, tile_px, overlap_px):
            tile = _forward(network, lr[..., top : top + tile_px, left : left + tile_px], scale)
            into = (..., _scaled(rows, scale), _scaled(columns, scale))
            sr[into] = tile[..., _scaled(rows, scale, top), _scaled(columns, scale, left)]
            on_tile()
    return sr


def count_tiles(height: int, width: int, tile_px: int, overlap_px: int) -> int:
    """Number of forward passes that `enlarge` makes for an image of this size in LR pixels."""
    if tile_px <= 0 or height * width <= tile_px**2:
        return 1
    return len(_spans(height, tile_px, overlap_px)) * len(_spans(width, tile_px, overlap_px))


def _spans(size: int, tile: int, overlap: int) -> list[tuple[int, slice]]:
    """Start of each tile along a side, and the pixels that are used of it. The latter cover the side exactly once."""
    last = max(size - tile, 0)
    starts = [*range(0, last, tile - 2 * overlap), last]
    edges = [0, *(start + tile - overlap for start in starts[:-1]), size]
    return [(start, slice(edges[i], edges[i + 1])) for i, start in enumerate(starts)]


def _scaled(span: slice, scale: int, origin: int = 0) -> slice:
    return slice((span.start - origin) * scale, (span.stop - origin) * scale)


def _forward(network: Callable[[Tensor], Tensor], lr: Tensor, scale: int) -> Tensor:
    try:
        with full_precision():
            sr = network(lr.clone())  # some public networks write into their input
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"an image of {lr.shape[-2]}x{lr.shape[-1]} LR px does not fit into the device's memory",
            fix="use smaller tiles, or the CPU",
        ) from error
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the network cannot take an image of {lr.shape[-2]}x{lr.shape[-1]} LR px: {reason}",
            fix="use a larger image, or another network",
        ) from error
    expected = (len(lr), 3, lr.shape[-2] * scale, lr.shape[-1] * scale)
    if tuple(sr.shape) != expected:
        raise InputError(
            f"the network turned {tuple(lr.shape)} into {tuple(sr.shape)}, which is not x{scale}",
            fix=f"use weights of an RGB x{scale} network",
        )
    if not bool(torch.isfinite(sr).all()):
        raise InputError("the network's output is not finite", fix="the weights are damaged: train again")
    return sr
