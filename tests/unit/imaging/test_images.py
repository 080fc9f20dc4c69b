"""Pixels to PNG and to tensors, and back."""

from __future__ import annotations

import numpy as np

from ddsr_core.imaging.decode import decode_rgb
from ddsr_core.imaging.images import encode_png, to_float, to_uint8

COLORS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def test_png_round_trip_is_exact_and_its_bytes_are_always_the_same() -> None:
    assert encode_png(COLORS) == encode_png(COLORS.copy())
    np.testing.assert_array_equal(decode_rgb(encode_png(COLORS), "x"), COLORS)


def test_conversions_are_inverse_and_rounded() -> None:
    x = to_float(COLORS)
    assert x.shape == (1, 3, 12, 20)
    np.testing.assert_array_equal(to_uint8(x)[0], COLORS)
    assert to_uint8(x * 0 + 2.0).max() == 255
