"""The Winograd form against PyTorch's own convolution in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ddsr_core import winograd
from ddsr_core.winograd import FoldedConv2d, WinogradConv2d, accelerate, fits, folds, transforms


@pytest.mark.parametrize("taps", [3, 5])
def test_the_identity_of_one_dimension(taps: int) -> None:
    """Outputs of a filter equal the products in the transformed domain, to double precision."""
    generator = np.random.default_rng(0)
    samples, kernel = generator.normal(size=4 + taps - 1), generator.normal(size=taps)
    t = transforms(4, taps)
    ours = t.outputs @ ((t.kernel @ kernel) * (t.inputs @ samples))
    assert ours == pytest.approx(np.correlate(samples, kernel, "valid"), abs=1e-12)


@pytest.mark.parametrize(
    ("side", "padding", "height", "width"), [(3, 1, 19, 29), (3, 0, 6, 6), (5, 2, 39, 58), (5, 0, 8, 21), (3, 1, 1, 2)]
)
def test_equals_the_convolution(side: int, padding: int, height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_TILES_AT_ONCE", 6)  # several strips, the last one smaller
    generator = torch.Generator().manual_seed(side)
    conv = nn.Conv2d(20, 24, side, padding=padding).requires_grad_(False)
    for parameter in conv.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(2, 20, height, width, generator=generator)
    fast = WinogradConv2d(conv)(x)
    exact = conv.double()(x.double())
    assert fast.shape == exact.shape
    assert fast.is_contiguous(memory_format=torch.channels_last) or fast.shape[-1] % 4
    assert (fast - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize(("height", "width"), [(31, 31), (64, 83), (45, 66), (34, 33)])
def test_a_strided_convolution_folded_into_channels(height: int, width: int) -> None:
    """The shape of AlexNet's first convolution, with every remainder of the size by the stride."""
    conv = nn.Conv2d(3, 8, 11, stride=4, padding=2).requires_grad_(False)
    generator = torch.Generator().manual_seed(width)
    for parameter in conv.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(2, 3, height, width, generator=generator)
    assert folds(conv)
    folded = FoldedConv2d(conv)(x)
    exact = conv.double()(x.double())
    assert folded.shape == exact.shape
    assert (folded - exact).abs().max() < 1e-5 * exact.abs().max()


def test_only_what_fits_is_replaced() -> None:
    kept = [
        nn.Conv2d(3, 64, 3, padding=1),  # too few channels to gain
        nn.Conv2d(32, 32, 3, stride=2),
        nn.Conv2d(3, 32, 11, stride=(4, 3)),
        nn.Conv2d(32, 32, 7),
        nn.Conv2d(32, 32, 3, groups=2),
        nn.Conv2d(32, 32, 3, dilation=2),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(32, 32, 3, padding="same"),
    ]
    assert not any(fits(conv) or folds(conv) for conv in kept)
    model = nn.Sequential(kept[0], nn.Sequential(nn.Conv2d(64, 32, 5, bias=False), nn.ReLU()))
    x = torch.rand((1, 3, 20, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(x)
        after = accelerate(model)(x)
    assert model[0] is kept[0]
    assert isinstance(model[1][0], WinogradConv2d)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
