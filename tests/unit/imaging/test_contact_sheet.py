"""Contact sheets: where each image lies."""

from __future__ import annotations

import numpy as np
import pytest

from ddsr_core.imaging.contact_sheet import GAP_PX, contact_sheet


def test_a_contact_sheet_holds_the_images_row_by_row() -> None:
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    images = [np.full((20 + index, 30, 3), color, np.uint8) for index, color in enumerate(colors)]
    sheet = contact_sheet(images, columns=2, px=16)
    pitch = 16 + GAP_PX
    assert sheet.shape == (2 * pitch - GAP_PX, 2 * pitch - GAP_PX, 3)
    for index, color in enumerate(colors):
        y, x = index // 2 * pitch, index % 2 * pitch
        assert (sheet[y : y + 16, x : x + 16] == color).all()
    assert (sheet[pitch:, pitch:] == 255).all()
    assert (sheet[16:pitch] == 255).all()


def test_a_contact_sheet_is_no_wider_than_its_images() -> None:
    assert contact_sheet([np.zeros((8, 8, 3), np.uint8)] * 2, columns=5, px=8).shape == (8, 16 + GAP_PX, 3)


def test_a_contact_sheet_needs_an_image() -> None:
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], columns=2, px=8)
