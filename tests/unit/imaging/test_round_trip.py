"""The round trip of the patches stage against the resampling that training and evaluation use."""

import cv2
import numpy as np
import pytest

from ddsr_core.imaging.bicubic import downsample, gray, upsample
from ddsr_core.imaging.images import to_float
from ddsr_core.imaging.kernel import Kernel
from ddsr_core.imaging.round_trip import squared_error_sums


def photo(height: int, width: int) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 0.8)


def cell_sums(squares: np.ndarray, cell: int) -> np.ndarray:
    """Sums over whole cells, the plain way."""
    rows, columns = (side // cell for side in squares.shape)
    whole = squares[: rows * cell, : columns * cell]
    sums: np.ndarray = whole.reshape(rows, cell, columns, cell).sum((1, 3))
    return sums


@pytest.mark.parametrize("kernel", ["matlab", "opencv"])
@pytest.mark.parametrize("cell", [4, 16, 32])
@pytest.mark.parametrize("size", [(32, 32), (100, 132), (64, 204)])
def test_sums_are_those_of_the_bicubic_round_trip(kernel: Kernel, cell: int, size: tuple[int, int]) -> None:
    image = photo(*size)
    luma = gray(to_float(image).double())
    error = luma - upsample(downsample(luma, kernel=kernel), kernel=kernel)
    expected = cell_sums(error[0, 0].square().numpy(), cell)
    actual = squared_error_sums(image, kernel, cell)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=2e-5)


@pytest.mark.parametrize("kernel", ["matlab", "opencv"])
@pytest.mark.parametrize(
    ("scale", "cell", "size"), [(2, 16, (64, 102)), (2, 2, (18, 34)), (3, 24, (75, 99)), (3, 8, (63, 72))]
)
def test_sums_at_other_scales(kernel: Kernel, scale: int, cell: int, size: tuple[int, int]) -> None:
    image = photo(*size)
    luma = gray(to_float(image).double())
    error = luma - upsample(downsample(luma, scale, kernel), scale, kernel)
    expected = cell_sums(error[0, 0].square().numpy(), cell)
    np.testing.assert_allclose(squared_error_sums(image, kernel, cell, scale), expected, rtol=2e-5)


def test_the_opencv_kernel_is_opencvs() -> None:
    image = photo(64, 96)
    luma = gray(to_float(image))[0, 0].numpy()
    low = cv2.resize(luma, (24, 16), interpolation=cv2.INTER_CUBIC)
    error = luma - cv2.resize(low, (96, 64), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_allclose(squared_error_sums(image, "opencv", 32), cell_sums(error**2, 32), rtol=1e-4)


def test_a_smooth_image_has_no_error_inside_and_more_in_the_cells_at_its_borders() -> None:
    ramp = np.repeat(np.arange(128, dtype=np.uint8)[None, :, None], 96, 0).repeat(3, 2)
    sums = squared_error_sums(ramp, "matlab", 32)
    assert sums[:, 1:3].max() < 1e-6
    assert sums[:, 0].min() > 1e-4
