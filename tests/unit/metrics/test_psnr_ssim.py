"""PSNR and SSIM against BasicSR's functions, hand-computed values and invariants."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
import torch
from skimage import data as photos

from ddsr_core.errors import InputError
from ddsr_core.metrics import psnr_ssim as metrics
from ddsr_core.metrics.psnr_ssim import fidelity, mean_psnr, rgb_to_y, to_levels


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    """A photo and a blurred, noisy copy of it, uint8 HWC."""
    hr = photos.astronaut()[40:201, 100:297]
    noise = np.random.default_rng(0).normal(0, 6, hr.shape)
    blurred = (hr.astype(float) + np.roll(hr, 1, 0) + np.roll(hr, 1, 1)) / 3
    return hr, np.clip(blurred + noise, 0, 255).round().astype(np.uint8)


def bchw(*images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("crop_border", [0, 3, 4])
def test_equals_basicsr(pair: tuple[np.ndarray, np.ndarray], crop_border: int) -> None:
    theirs = pytest.importorskip("ddsr_core.sr.basicsr_compat").import_basicsr("metrics.psnr_ssim")
    hr, sr = pair
    ours = fidelity(bchw(sr), bchw(hr), crop_border=crop_border)
    for on_y, psnr, ssim in [(True, ours.psnr_y, ours.ssim_y), (False, ours.psnr_rgb, ours.ssim_rgb)]:
        # BasicSR takes BGR, OpenCV's order
        given = (sr[..., ::-1].copy(), hr[..., ::-1].copy(), crop_border)
        assert psnr.item() == pytest.approx(theirs.calculate_psnr(*given, test_y_channel=on_y), abs=1e-3)
        assert ssim.item() == pytest.approx(theirs.calculate_ssim(*given, test_y_channel=on_y), abs=1e-4)


def test_ssim_holds_in_flat_bright_regions() -> None:
    """Where the variance is zero and the level high, float32 cancellation would show against C2."""
    hr = torch.full((1, 3, 32, 32), 250, dtype=torch.uint8)
    sr = hr.clone()
    sr[..., ::2, :] = 251
    c2 = (0.03 * 255) ** 2
    result = fidelity(sr, hr, crop_border=0).ssim_rgb.item()
    # variance of the stripes under the window is within 1e-3 of 1/4; mu differs by 1/2 at level 250
    assert result == pytest.approx(c2 / (c2 + 0.25), abs=1e-4)


def test_a_batch_is_its_images_one_by_one(pair: tuple[np.ndarray, np.ndarray]) -> None:
    hr, sr = bchw(pair[0], pair[1]), bchw(pair[1], pair[1])
    together = fidelity(sr, hr, crop_border=4)
    alone = [fidelity(sr[i : i + 1], hr[i : i + 1], crop_border=4) for i in range(2)]
    for name in metrics.Fidelity._fields:
        expected = torch.cat([getattr(one, name) for one in alone])
        torch.testing.assert_close(getattr(together, name), expected)


def test_floats_are_clamped_and_rounded_first(pair: tuple[np.ndarray, np.ndarray]) -> None:
    hr, sr = bchw(pair[0]), bchw(pair[1])
    rough = sr.float() / 255 + 0.3 / 255  # less than half a level off
    rough = torch.where(sr == 255, 1.7, torch.where(sr == 0, -0.2, rough))
    assert torch.equal(to_levels(rough), sr.float())
    assert fidelity(rough, hr, crop_border=4) == fidelity(sr, hr, crop_border=4)


def test_strips_give_the_ssim_of_the_whole(pair: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    sr, hr = bchw(pair[1]), bchw(pair[0])
    whole = fidelity(sr, hr, crop_border=4)
    for strip_px in (1, 7 * 189, 152 * 189):  # one row at a time, seven, all but the last
        monkeypatch.setattr(metrics, "_STRIP_PX", strip_px)
        torch.testing.assert_close(fidelity(sr, hr, crop_border=4), whole, rtol=1e-6, atol=1e-7)


def test_rounded_y_is_that_of_8_bit_luma(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """Against BasicSR's SSIM and PSNR of two gray images that hold MATLAB's rounded Y."""
    theirs = pytest.importorskip("ddsr_core.sr.basicsr_compat").import_basicsr("metrics.psnr_ssim")
    hr, sr = pair
    ours = fidelity(bchw(sr), bchw(hr), crop_border=4, round_y=True)
    luma = [np.rint(image @ np.array([65.481, 128.553, 24.966]) / 255 + 16)[..., None] for image in (sr, hr)]
    assert ours.psnr_y.item() == pytest.approx(theirs.calculate_psnr(*luma, 4), abs=1e-3)
    assert ours.ssim_y.item() == pytest.approx(theirs.calculate_ssim(*luma, 4), abs=1e-4)
    plain = fidelity(bchw(sr), bchw(hr), crop_border=4)
    assert ours.ssim_y != plain.ssim_y
    assert (ours.psnr_rgb, ours.ssim_rgb) == (plain.psnr_rgb, plain.ssim_rgb)


def test_y_of_black_white_and_green() -> None:
    colors = torch.tensor([[0.0, 0, 0], [255, 255, 255], [0, 255, 0]]).view(3, 3, 1, 1)
    assert rgb_to_y(colors).flatten().tolist() == pytest.approx([16.0, 235.0, 144.553], abs=1e-3)


def test_gray_error_is_132_hundredths_db_higher_on_y(pair: tuple[np.ndarray, np.ndarray]) -> None:
    hr = bchw(pair[0]).float().clamp(10, 240)
    noise = torch.randint(-9, 10, (1, 1, *hr.shape[2:]), generator=torch.Generator().manual_seed(0))
    result = fidelity((hr + noise).byte(), hr.byte(), crop_border=4)
    assert (result.psnr_y - result.psnr_rgb).item() == pytest.approx(20 * math.log10(255 / 219), abs=1e-4)


def test_equal_images_have_infinite_psnr_left_out_of_the_mean(
    pair: tuple[np.ndarray, np.ndarray],
) -> None:
    same = fidelity(bchw(pair[0]), bchw(pair[0]), crop_border=4)
    assert same.psnr_y.item() == same.psnr_rgb.item() == math.inf
    assert same.ssim_y.item() == pytest.approx(1, abs=1e-6)
    assert mean_psnr([same.psnr_y.item(), 24.0]) == 24.0
    assert mean_psnr([math.inf]) is None


def test_what_cannot_be_compared_is_refused(pair: tuple[np.ndarray, np.ndarray]) -> None:
    hr = bchw(pair[0])
    with pytest.raises(InputError, match="cannot compare"):
        fidelity(hr[..., :-1], hr, crop_border=4)
    with pytest.raises(InputError, match="too small"):
        fidelity(hr[..., :18, :], hr[..., :18, :], crop_border=4)


def test_docstring_examples_run() -> None:
    assert doctest.testmod(metrics).failed == 0
