"""Diffusion formulas: round trips, hand values, and diffusers' scheduler as oracle."""

import math

import torch
from diffusers import DDPMScheduler

from ddsr_core.diffusion.gaussian import (
    Schedule,
    discretized_gaussian_nll,
    learned_log_variance,
    normal_kl,
    predict_eps,
    predict_x0,
    q_sample,
    simple_and_vb,
)

SCHEDULE = Schedule()
ORACLE = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)


def batch(t: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (len(t), 4, 6, 6)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), torch.tensor(t)


def test_q_sample_equals_diffusers():
    x0, noise, t = batch([0, 10, 500, 999])
    torch.testing.assert_close(q_sample(SCHEDULE, x0, t, noise), ORACLE.add_noise(x0, noise, t), rtol=1e-5, atol=1e-5)


def test_x0_round_trip():
    x0, noise, t = batch([0, 100, 500, 900])
    x_t = q_sample(SCHEDULE, x0, t, noise)
    torch.testing.assert_close(predict_x0(SCHEDULE, x_t, t, noise), x0, rtol=0, atol=2e-4)
    torch.testing.assert_close(predict_eps(SCHEDULE, x_t, t, x0), noise, rtol=0, atol=2e-3)


def test_coefficient_on_eps_matches_the_notes():
    for t, expected in ((100, 0.34), (200, 0.72), (300, 1.24), (500, 3.4), (900, 61.0), (999, 157.0)):
        assert math.isclose(SCHEDULE.sqrt_recip_alpha_bar_minus_one[t], expected, rel_tol=0.02)


def test_learned_variance_interpolates_between_posterior_and_beta():
    t = torch.tensor([5, 700])
    ones = torch.ones(2, 1, 1, 1)
    torch.testing.assert_close(learned_log_variance(SCHEDULE, ones, t).flatten(), SCHEDULE.log_beta[t])
    torch.testing.assert_close(learned_log_variance(SCHEDULE, -ones, t).flatten(), SCHEDULE.posterior_log_variance[t])


def test_kl_of_equal_gaussians_is_zero_and_of_shifted_ones_is_known():
    zero = torch.zeros(1)
    assert float(normal_kl(zero, zero, zero, zero)) == 0
    assert math.isclose(float(normal_kl(zero + 2, zero, zero, zero)), 2.0)  # (2^2) / 2


def test_discretized_likelihood_of_all_bins_sums_to_one():
    bins = torch.linspace(-1, 1, 256)
    total = (-discretized_gaussian_nll(bins, torch.tensor(0.1), torch.tensor(-2.0))).exp().sum()
    assert math.isclose(float(total), 1.0, abs_tol=2e-3)


def test_perfect_prediction_has_no_loss_and_vb_gradient_reaches_only_the_variance():
    x0, noise, t = batch([50, 400])
    x_t = q_sample(SCHEDULE, x0, t, noise)
    output = torch.cat([noise, -torch.ones_like(noise)], 1).requires_grad_()
    mse, vb = simple_and_vb(SCHEDULE, output, x0, x_t, t, noise)
    assert mse.abs().max() == 0
    assert vb.abs().max() < 1e-4
    shifted = torch.cat([noise + 0.1, torch.zeros_like(noise)], 1).requires_grad_()
    simple_and_vb(SCHEDULE, shifted, x0, x_t, t, noise)[1].sum().backward()
    assert shifted.grad[:, :4].abs().max() == 0
    assert shifted.grad[:, 4:].abs().max() > 0
