"""Images per pseudo-label."""

import pytest

from ddsr_core.sampling.allocation import images_per_label


@pytest.mark.parametrize(
    ("count", "sizes", "allocation", "expected"),
    [
        (70, [5] * 7, "equal", [10] * 7),
        (10, [5, 9, 9], "equal", [3, 4, 3]),
        (2, [1, 2, 3], "equal", [0, 1, 1]),
        (5, [4, 4], "equal", [3, 2]),
        (10, [50, 30, 20], "proportional", [5, 3, 2]),
        (11, [20, 50, 30], "proportional", [2, 6, 3]),  # 2.2, 5.5, 3.3
        (3, [98, 1, 1], "proportional", [3, 0, 0]),
    ],
)
def test_shares_add_up_and_the_rest_goes_to_the_largest(count: int, sizes: list[int], allocation, expected: list[int]):  # type: ignore[no-untyped-def]
    assert images_per_label(count, sizes, allocation) == expected
