"""Both kernels against their oracles (BasicSR's imresize, OpenCV), and PSNR_bic by hand."""

import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddsr_core.imaging.bicubic import downsample, make_lr, psnr_bic, symmetric_pad, upsample
from ddsr_core.sr.basicsr_compat import import_basicsr


def random_image(height: int = 48, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).random((height, width, 3)).astype(np.float32)


def as_batch(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def as_image(batch: torch.Tensor) -> np.ndarray:
    return batch[0].permute(1, 2, 0).numpy()


def test_matlab_kernel_equals_imresize_both_ways():
    imresize = import_basicsr("utils.matlab_functions").imresize
    image = random_image()
    np.testing.assert_allclose(as_image(downsample(as_batch(image))), imresize(image, 0.25), atol=1e-6)
    np.testing.assert_allclose(as_image(upsample(as_batch(image))), imresize(image, 4), atol=1e-6)


def test_opencv_kernel_equals_cv2_both_ways():
    image = random_image()
    small = cv2.resize(image, (16, 12), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_allclose(as_image(downsample(as_batch(image), kernel="opencv")), small, atol=1e-6)
    large = cv2.resize(image, (256, 192), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_allclose(as_image(upsample(as_batch(image), kernel="opencv")), large, atol=1e-6)


@given(st.integers(1, 12), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_padding_is_numpys_symmetric(side: int, margin: int):
    x = torch.arange(side * 2, dtype=torch.float32).reshape(1, 1, side, 2)
    expected = np.pad(x[0, 0].numpy(), margin, mode="symmetric")
    np.testing.assert_array_equal(symmetric_pad(x, margin)[0, 0].numpy(), expected)


def test_psnr_bic_of_a_flat_image_is_the_cap_and_of_stripes_is_their_variance():
    assert float(psnr_bic(torch.full((1, 3, 16, 16), 0.5))) > 110
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., ::2] = 1.0  # beyond what x4 can carry: the round trip leaves their mean, an error of 1/4
    assert math.isclose(float(psnr_bic(stripes)), 10 * math.log10(4), abs_tol=0.15)


def test_opencv_psnr_bic_is_lower_than_matlabs_on_texture():
    texture = as_batch(cv2.GaussianBlur(random_image(128, 128), (0, 0), 1.2))
    difference = float(psnr_bic(texture) - psnr_bic(texture, kernel="opencv"))
    assert 0.5 < difference < 4


def test_psnr_bic_has_a_gradient_that_lowers_it():
    x = as_batch(cv2.GaussianBlur(random_image(), (0, 0), 2.0)).requires_grad_()
    before = psnr_bic(x)
    before.sum().backward()
    after = psnr_bic(x.detach() - 0.5 * x.grad / x.grad.norm())
    assert after < before


def test_lr_images_have_8_bits():
    levels = make_lr(as_batch(random_image())) * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)


def test_sides_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiples of 4"):
        downsample(torch.zeros(1, 3, 18, 16))


def test_psnr_bic_crops_to_whole_lr_pixels():
    image = as_batch(random_image(64, 64))
    assert psnr_bic(image, scale=3).item() == psnr_bic(image[..., :63, :63], scale=3).item()
