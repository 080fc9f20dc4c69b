"""Differences between networks and their intervals."""

import numpy as np
import pytest

from ddsr_core.report.statistics import difference, is_positive


def scores(table: np.ndarray) -> dict[int, dict[str, float]]:
    """PSNR-Y of each seed (row) on each photo (column)."""
    return {seed: {f"{photo}.png": float(value) for photo, value in enumerate(row)} for seed, row in enumerate(table)}


def test_the_interval_is_that_of_student_over_seeds_and_photos():
    table = np.zeros((3, 6))
    other = table - np.array([[0.1], [0.2], [0.3]])  # differences vary over seeds alone
    found = difference(scores(table), scores(other))
    assert found is not None
    assert found.mean == pytest.approx(0.2)
    assert found.half_width == pytest.approx(4.302653 * 0.1 / np.sqrt(3), rel=1e-5)  # t at 2 degrees of freedom
    assert found.by_seed == pytest.approx((0.1, 0.2, 0.3))
    assert found.level == "equal"


def test_photos_count_as_chance_too():
    table = np.zeros((3, 6))
    other = table - np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    found = difference(scores(table), scores(other))
    assert found is not None
    assert found.half_width == pytest.approx(4.302653 * np.std([0, 0.1, 0.2, 0.3, 0.4, 0.5], ddof=1) / np.sqrt(6), rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 6), (3, 4), (1, 1)])
def test_few_seeds_or_few_photos_cannot_tell(shape: tuple[int, int]):
    found = difference(scores(np.ones(shape)), scores(np.zeros(shape)))
    assert found is not None
    assert (found.mean, found.half_width, found.level) == (1.0, None, "unknown")


def test_only_seeds_and_photos_that_both_have_are_compared():
    ours, theirs = scores(np.ones((4, 7))), scores(np.zeros((3, 6)))
    found = difference(ours, theirs)
    assert found is not None
    assert (found.seeds, found.photos, found.level) == (3, 6, "better")
    assert difference(ours, {}) is None
    assert difference({0: {"a": 1.0}}, {0: {"b": 1.0}}) is None


def test_in_3000_trials_without_a_difference_at_most_5_percent_are_called_one():
    """Seeds and photos have effects of their own on both sets."""
    generator = np.random.default_rng(0)
    called = 0
    for _ in range(3000):
        seeds, photos = generator.normal(size=(3, 1)) * 0.1, generator.normal(size=(1, 6)) * 0.1
        table = seeds + photos + generator.normal(size=(3, 6)) * 0.05
        found = difference(scores(table), scores(np.zeros((3, 6))))
        called += found is not None and found.level != "equal"
    assert called / 3000 < 0.05


def test_a_gain_needs_three_seeds_and_more_than_their_spread():
    assert is_positive([0.10, 0.11, 0.12])
    assert not is_positive([0.10, 0.11])
    assert not is_positive([0.03, -0.02, 0.05])
