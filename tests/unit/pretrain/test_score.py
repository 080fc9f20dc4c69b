"""Scores of samples: known values in small cases."""

import itertools
import math

import numpy as np
import pytest
import torch

from ddsr_core.diffusion.dit import DiT, DiTConfig
from ddsr_core.pretrain.features import TokenBasis, describe, make_classes
from ddsr_core.pretrain.score import (
    Reference,
    cloud_scores,
    eps_errors,
    other_classes,
    row_effect,
)
from ddsr_core.pseudo_labels.patch_features import PatchFeatures, nearest_class


def cloud(count: int, seed: int = 0, dims: int = 6) -> torch.Tensor:
    return torch.randn(count, dims, generator=torch.Generator().manual_seed(seed))


def test_scores_of_the_real_thing_are_perfect():
    features = torch.nn.functional.normalize(cloud(40, dims=8), dim=1)
    classes = torch.arange(40) % 4
    psnr = torch.linspace(20, 30, 40)
    reference = Reference(features, classes, psnr, features, classes, torch.empty(0))
    scores = cloud_scores(features, psnr + 1.5, classes, reference)
    assert scores["precision"] == scores["recall"] == scores["own_class_share"] == 1
    assert scores["frechet"] == pytest.approx(0, abs=1e-6)
    assert scores["psnr_bic_distance_db"] == pytest.approx(1.5, rel=1e-5)
    assert scores["nearest_cosine"] == pytest.approx(1, rel=1e-5)


def test_other_rows_are_other_classes():
    classes = torch.tensor([0, 0, 1, 2, 2])
    assert other_classes(classes).tolist() == [1, 1, 2, 0, 0]


def test_a_model_that_ignores_its_label_has_no_row_effect():
    model = DiT(DiTConfig(latent_px=4, hidden=16, depth=1, heads=2, classes=3))
    model.initialize(torch.Generator().manual_seed(0))  # its output is zero
    errors = eps_errors(model, torch.randn(6, 4, 4, 4), torch.arange(6) % 3, seed=0)
    assert errors["eps_own_50"] == pytest.approx(1, abs=0.3)
    assert row_effect(errors, "other") == row_effect(errors, "null") == 0


@pytest.fixture(scope="module")
def network() -> PatchFeatures:
    return PatchFeatures(64, grid=8)


def test_patches_get_vectors_tokens_and_classes(network: PatchFeatures):
    patches = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    patches[6:] //= 8
    vectors, tokens = describe(patches, network, dims=5)
    assert tokens.shape == (12, 64, 5)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(12))
    classes, centers = make_classes(vectors, 2, seed=0)
    assert len(set(classes[:6].tolist())) == len(set(classes[6:].tolist())) == 1
    assert torch.equal(nearest_class(vectors, centers), classes)


def test_token_basis_keeps_the_most_variance(network: PatchFeatures):
    patches = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    basis = TokenBasis.of(network, patches, dims=6)
    torch.testing.assert_close(basis.components.T @ basis.components, torch.eye(6), atol=1e-5, rtol=0)
    maps = network(torch.from_numpy(patches).permute(0, 3, 1, 2) / 255)[1]
    variances = basis.project(maps).flatten(0, 1).var(0)
    assert all(first >= second for first, second in itertools.pairwise(variances))
    assert not math.isnan(float(variances[0]))
