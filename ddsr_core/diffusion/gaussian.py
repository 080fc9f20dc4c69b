"""Gaussian diffusion: the forward process, x0 from eps, and the loss with learned variance (paper, equation 2).

Equation numbers D are those of Ho et al. 2020 (DDPM), I those of Nichol & Dhariwal 2021 (improved DDPM). Everything here is
float32: at t = 999, an error of 2^-8 in eps becomes an error of 0.6 sigma in x0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STEPS = 1000


class Schedule:
    """Linear betas from 1e-4 to 0.02 over 1000 steps, as DiT was trained with; computed in float64, stored as float32.

    Attributes:
        beta, alpha_bar, alpha_bar_prev: ``(1000,)``.
        posterior_variance, posterior_log_variance: of q(x_{t-1} | x_t, x0) (D7); the log at t = 0 is that of t = 1.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        beta = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
        alpha_bar = (1 - beta).cumprod(0)
        alpha_bar_prev = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
        log_variance = torch.cat([variance[1:2], variance[1:]]).log()

        def keep(x: Tensor) -> Tensor:
            return x.float().to(device)

        self.beta, self.alpha_bar, self.alpha_bar_prev = keep(beta), keep(alpha_bar), keep(alpha_bar_prev)
        self.log_beta = keep(beta.log())
        self.posterior_variance, self.posterior_log_variance = keep(variance), keep(log_variance)
        self.posterior_x0 = keep(beta * alpha_bar_prev.sqrt() / (1 - alpha_bar))
        self.posterior_xt = keep((1 - alpha_bar_prev) * (1 - beta).sqrt() / (1 - alpha_bar))
        self.sqrt_alpha_bar, self.sqrt_one_minus_alpha_bar = (
            keep(alpha_bar.sqrt()),
            keep((1 - alpha_bar).sqrt()),
        )
        self.sqrt_recip_alpha_bar = keep(alpha_bar.rsqrt())
        self.sqrt_recip_alpha_bar_minus_one = keep((1 / alpha_bar - 1).sqrt())


def at(values: Tensor, t: Tensor) -> Tensor:
    """``values[t]`` as ``(B, 1, 1, 1)``."""
    return values[t][:, None, None, None]


def q_sample(schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t ~ q(x_t | x0) for the given noise (D4); all ``(B, C, h, w)``, ``t (B,)``."""
    return at(schedule.sqrt_alpha_bar, t) * x0 + at(schedule.sqrt_one_minus_alpha_bar, t) * noise


def predict_x0(schedule: Schedule, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The x0 that follows from ``eps`` (D15): x_t / sqrt(abar) - sqrt(1/abar - 1) eps. Not clamped."""
    return at(schedule.sqrt_recip_alpha_bar, t) * x_t - at(schedule.sqrt_recip_alpha_bar_minus_one, t) * eps


def predict_eps(schedule: Schedule, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """Inverse of `predict_x0`."""
    return (at(schedule.sqrt_recip_alpha_bar, t) * x_t - x0) / at(schedule.sqrt_recip_alpha_bar_minus_one, t)


def posterior_mean(schedule: Schedule, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Mean of q(x_{t-1} | x_t, x0) (D7)."""
    return at(schedule.posterior_x0, t) * x0 + at(schedule.posterior_xt, t) * x_t


def learned_log_variance(schedule: Schedule, v: Tensor, t: Tensor) -> Tensor:
    """Log variance from the network's second half ``v`` in [-1, 1]: between posterior variance and beta (I15)."""
    low, high = at(schedule.posterior_log_variance, t), at(schedule.log_beta, t)
    fraction = (v + 1) / 2
    return fraction * high + (1 - fraction) * low


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL divergence of two diagonal Gaussians in nats, elementwise."""
    return 0.5 * (-1 + logvar2 - logvar1 + (logvar1 - logvar2).exp() + (mean1 - mean2).square() * (-logvar2).exp())


def discretized_gaussian_nll(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """-log probability in nats of ``x`` (bins of 2/255 in [-1, 1]) under a Gaussian (D13), elementwise."""
    inverse = (-log_scale).exp()
    centered = x - mean

    def cdf(value: Tensor) -> Tensor:
        # The tanh approximation, not erf, because the published DiT weights were trained with it.
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    upper, lower = cdf(inverse * (centered + 1 / 255)), cdf(inverse * (centered - 1 / 255))
    inside = (upper - lower).clamp(min=1e-12).log()
    log_probability = torch.where(
        x < -0.999,
        upper.clamp(min=1e-12).log(),
        torch.where(x > 0.999, (1 - lower).clamp(min=1e-12).log(), inside),
    )
    return -log_probability


def simple_and_vb(
    schedule: Schedule, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """The two terms of the base loss.

    Args:
        output: the network's ``(B, 2C, h, w)``.
        x0, x_t, noise: ``(B, C, h, w)``.
        t: ``(B,)``.

    Returns:
        ``mse (B,)``: L_simple (paper, equation 2); ``vb (B,)``: the variational bound in bits per dimension (I17),
        whose gradient reaches only the variance.
    """
    eps, v = output.float().chunk(2, dim=1)
    mse = (eps - noise).square().mean((1, 2, 3))
    mean = posterior_mean(schedule, predict_x0(schedule, x_t, t, eps.detach()), x_t, t)
    log_variance = learned_log_variance(schedule, v, t)
    true_mean = posterior_mean(schedule, x0, x_t, t)
    kl = normal_kl(true_mean, at(schedule.posterior_log_variance, t), mean, log_variance)
    nll = discretized_gaussian_nll(x0, mean, 0.5 * log_variance)
    vb = torch.where(t == 0, nll.mean((1, 2, 3)), kl.mean((1, 2, 3))) / math.log(2)
    return mse, vb
