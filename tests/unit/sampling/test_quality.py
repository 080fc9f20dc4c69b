"""Own-cluster share, precision, recall and distance in PSNR_bic of a set of images."""

import numpy as np
import pytest

from ddsr_core.sampling.quality import mean_precision_recall, set_quality
from ddsr_core.sampling.selection import Comparison, Nearest, unit_length


def cloud(count: int, axis: int, seed: int) -> np.ndarray:
    """Unit vectors around one axis of 16."""
    noise = 0.05 * np.random.default_rng(seed).standard_normal((count, 16))
    return unit_length(np.eye(16)[axis] + noise)


def comparison(vectors: np.ndarray, nearest: list[int], psnr: np.ndarray, real: list[np.ndarray]) -> Comparison:
    labels, none = np.repeat(np.arange(len(real)), [len(part) for part in real]), Nearest(len(vectors))
    return Comparison(psnr, vectors, none, none, np.array(nearest), np.full(len(labels), 22.0), labels, real)


def test_the_quality_is_that_of_the_selected_images():
    real = [cloud(40, 0, 1), cloud(40, 1, 2)]
    vectors = np.concatenate([cloud(10, 0, 3), cloud(10, 1, 4), cloud(10, 5, 5)])  # the last ten are nothing real
    nearest = [0] * 10 + [1] * 5 + [0] * 15
    compared = comparison(vectors, nearest, np.repeat([23.0, 22.0, 99.0], 10), real)
    good = set_quality(compared, list(range(20)), np.repeat([0, 1], 10))
    assert good.own_cluster_share == 0.75
    assert good.psnr_bic_distance_db == pytest.approx(0.5)
    assert good.precision > 0.7
    assert good.recall > 0.7
    bad = set_quality(compared, list(range(10, 30)), np.repeat([1, 0], 10))
    assert bad.precision < 0.6
    assert bad.own_cluster_share == 0.75
    assert set(bad.rounded()) == {"own_cluster_share", "precision", "recall", "psnr_bic_distance_db"}


def test_a_set_without_a_mode_misses_recall_alone():
    real = [np.concatenate([cloud(20, 0, 1), cloud(20, 1, 2)])]
    precision, recall = mean_precision_recall(cloud(20, 0, 3), np.zeros(20, int), real)
    assert precision > 0.6
    assert 0.2 < recall < 0.65


def test_real_patches_against_real_patches_are_the_best_that_a_set_can_be():
    real = [cloud(400, 0, 1), cloud(400, 1, 2)]
    precision, recall = mean_precision_recall(
        np.concatenate([cloud(40, 0, 3), cloud(40, 1, 4)]), np.repeat([0, 1], 40), real
    )
    assert precision > 0.8
    assert recall > 0.8
