"""Close-ups are compared exactly."""

import numpy as np

from ddsr_core.report.figures import crop_psnr


def test_crop_psnr_of_black_and_white_is_zero_and_of_equal_crops_undefined() -> None:
    hr = np.zeros((4, 4, 3), np.uint8)
    assert crop_psnr(hr + np.uint8(255), hr) == 0
    assert crop_psnr(hr, hr) is None
