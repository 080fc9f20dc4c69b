"""Tiles against the whole image, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ddsr_core.errors import InputError
from ddsr_core.imaging import tiling
from ddsr_core.imaging.bicubic import upsample
from ddsr_core.imaging.tiling import count_tiles, enlarge


def photo(height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def network() -> nn.Module:
    """x2, receptive field 4 LR pixels to each side."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(layer for _ in range(3) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())),
            nn.Conv2d(3, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )


@pytest.mark.parametrize(("height", "width"), [(41, 53), (16, 90), (90, 7), (17, 17)])
def test_tiles_equal_the_whole_image(network: nn.Module, height: int, width: int) -> None:
    lr = photo(height, width)
    calls: list[None] = []
    tiled = enlarge(network, lr, scale=2, tile_px=16, overlap_px=4, on_tile=lambda: calls.append(None))
    torch.testing.assert_close(tiled, enlarge(network, lr, scale=2), rtol=0, atol=1e-6)
    assert len(calls) == count_tiles(height, width, 16, 4) > 1


def test_too_little_overlap_shows(network: nn.Module) -> None:
    """So that the test above can fail."""
    lr = photo(41, 53)
    tiled = enlarge(network, lr, scale=2, tile_px=16, overlap_px=1)
    assert (tiled - enlarge(network, lr, scale=2)).abs().max() > 1e-4


@given(size=st.integers(1, 200), overlap=st.integers(0, 8), core=st.integers(1, 20))
def test_spans_cover_a_side_once_with_context(size: int, overlap: int, core: int) -> None:
    tile = 2 * overlap + core
    spans = tiling._spans(size, tile, overlap)
    assert [pixel for _, span in spans for pixel in range(span.start, span.stop)] == list(range(size))
    for start, span in spans:
        assert span.start - start >= (overlap if start else 0)
        assert min(start + tile, size) - span.stop >= (overlap if start + tile < size else 0)


def test_small_images_are_not_tiled() -> None:
    assert count_tiles(20, 30, 0, 8) == count_tiles(20, 30, 32, 8) == 1


def test_networks_that_write_into_their_input_do_no_harm() -> None:
    lr = photo(8, 8)
    before = lr.clone()
    enlarge(lambda x: upsample(x.mul_(255), 2), lr, scale=2)
    assert torch.equal(lr, before)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda x: upsample(x, 2), "not x4"),
        (lambda x: upsample(x, 4) / 0, "not finite"),
        (nn.ReflectionPad2d(20), "cannot take an image of 9x9"),
    ],
)
def test_networks_that_do_not_fit(network: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message):
        enlarge(network, photo(9, 9), scale=4)


def test_overlap_that_leaves_nothing() -> None:
    with pytest.raises(InputError, match="leave nothing"):
        enlarge(lambda x: upsample(x, 4), photo(40, 40), scale=4, tile_px=16, overlap_px=8)
