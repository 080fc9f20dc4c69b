"""Distances of two clouds of feature vectors: known values in small cases."""

import pytest
import torch

from ddsr_core.metrics.clouds import frechet_distance, precision_recall


def cloud(count: int, seed: int = 0, dims: int = 6) -> torch.Tensor:
    return torch.randn(count, dims, generator=torch.Generator().manual_seed(seed))


def test_frechet_distance_of_shifted_and_stretched_clouds():
    one = cloud(500)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(one, one + 2) == pytest.approx(6 * 4, rel=1e-5)
    variance = one.double().var(0).sum()
    assert frechet_distance(one, 3 * (one - one.mean(0)) + one.mean(0)) == pytest.approx(4 * float(variance), rel=1e-4)


def test_precision_and_recall_tell_missing_modes_from_bad_images():
    left, right = cloud(100) - 50, cloud(100, 1) + 50
    assert precision_recall(torch.cat([left, right]), left + 1e-3) == (1.0, 0.5)  # a mode is missing
    precision, recall = precision_recall(left, torch.cat([left, right]))
    assert (precision, recall) == (0.5, 1.0)  # half of the images are nothing real
