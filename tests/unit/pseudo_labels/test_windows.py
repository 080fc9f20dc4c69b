"""The scores of windows against PSNR_bic of single crops, and the positions of windows."""

from __future__ import annotations

import pytest

from ddsr_core.imaging.bicubic import psnr_bic
from ddsr_core.imaging.images import to_float
from ddsr_core.imaging.kernel import Kernel
from ddsr_core.pseudo_labels.config import PatchesConfig
from ddsr_core.pseudo_labels.windows import offsets, score_windows
from tests.unit.pseudo_labels.test_patches import photo


@pytest.mark.parametrize("kernel", ["matlab", "opencv"])
def test_scores_of_textured_windows_equal_those_of_single_crops_up_to_their_borders(kernel: Kernel) -> None:
    config = PatchesConfig(patch_px=64, stride_px=32, kernel=kernel)
    image = photo(0, 128, 192)
    windows = score_windows(image, config)
    compared = 0
    for psnr, y, x in zip(windows.psnr_bic, windows.y, windows.x, strict=True):
        alone = float(psnr_bic(to_float(image[y : y + 64, x : x + 64]), kernel))
        if alone < 30:  # a smooth window's few errors lie at its border, where the two differ
            assert abs(psnr - alone) < 0.25
            compared += 1
    assert compared >= 4
    whole = score_windows(image[:64, :64], config)
    assert abs(float(whole.psnr_bic[0]) - float(psnr_bic(to_float(image[:64, :64]), kernel))) < 1e-3


def test_the_flush_window_touches_the_far_edge_on_the_x4_lattice() -> None:
    assert offsets(1003, 512, 256, flush=True).tolist() == [0, 256, 488]
    assert offsets(768, 512, 256, flush=True).tolist() == [0, 256]
