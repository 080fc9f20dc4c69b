"""Sampling latents: respaced ancestral DDPM with learned variance; DPM-Solver++ 2M and UniPC through diffusers.

Every image has its own generator, so it does not depend on the batch that it is sampled in (except for the last bits, in
which matrix products of different sizes differ).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddsr_core.diffusion.dit import DiT
from ddsr_core.diffusion.gaussian import STEPS, Schedule
from ddsr_core.diffusion.names import SAMPLERS, SamplerName
from ddsr_core.diffusion.published import import_diffusers
from ddsr_core.errors import ConfigError
from ddsr_core.factories import load_factory

#: (x_t (B, C, h, w), t) -> network output (B, 2C, h, w), guidance applied to eps.
Predict = Callable[[Tensor, int], Tensor]
#: (predict, noise (B, C, h, w), a generator per image, steps, init, strength) -> latents (B, C, h, w). ``init`` and
#: ``strength`` are those of `ancestral`. `ddsr_core.diffusion.names.SAMPLERS` lists the samplers.
Sampler = Callable[[Predict, Tensor, list[torch.Generator], int, Tensor | None, float], Tensor]


def image_generator(seed: int, index: int) -> torch.Generator:
    """The generator of image ``index`` of a run."""
    return torch.Generator().manual_seed(seed * 1_000_003 + index)


def noise_like(generators: list[torch.Generator], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal ``(B, *shape)``; row i comes from ``generators[i]`` on the CPU, so it is equal on every device."""
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    return noise.to(device, non_blocking=True)


def guided(model: DiT, rows: Tensor, scale: float, channels: int, interval: tuple[float, float] = (0, STEPS - 1)) -> Predict:
    """Classifier-free guidance: eps = eps_null + scale (eps_class - eps_null) on the first ``channels`` channels.

    ``scale`` 1 is the class prediction itself and costs a single forward pass. So does every t outside ``interval`` (which
    includes both ends), where the class prediction is used unchanged (Kynkäänniemi et al. 2024). The released code guides
    3 of 4 channels at every t.
    """
    null = torch.full_like(rows, model.config.null_row)

    def predict(x: Tensor, t: int) -> Tensor:
        steps = torch.full((len(x),), t, device=x.device)
        if scale == 1.0 or not interval[0] <= t <= interval[1]:
            return model(x, steps, rows).float()
        output = model(torch.cat([x, x]), torch.cat([steps, steps]), torch.cat([rows, null])).float()
        with_class, without = output.chunk(2)
        result = with_class.clone()
        result[:, :channels] = without[:, :channels] + scale * (with_class - without)[:, :channels]
        return result

    return predict


def spaced_steps(count: int) -> list[int]:
    """``count`` of the 1000 steps, evenly spaced from 0 to 999, rounded (improved DDPM's respacing).

    >>> spaced_steps(5)
    [0, 250, 500, 749, 999]
    """
    if count == 1:
        return [STEPS - 1]
    return [round(index * (STEPS - 1) / (count - 1)) for index in range(count)]


def ancestral(
    predict: Predict,
    noise: Tensor,
    generators: list[torch.Generator],
    steps: int,
    init: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """DDPM with the learned variance on a respaced schedule (Nichol & Dhariwal 2021, section 4).

    Args:
        init: latents like ``noise`` to start from, noised to the highest step below ``strength`` * 1000; None for pure
            noise.

    Raises:
        ConfigError: no step is below ``strength`` * 1000.
    """
    used = [t for t in spaced_steps(steps) if t < strength * STEPS]
    if not used:
        raise _no_step_left(steps, strength)
    # float64: with many steps a beta is the small difference of two alpha_bars that are nearly one
    alpha_bar = (1 - Schedule().beta.double()).cumprod(0)
    x = noise
    if init is not None:
        abar = float(alpha_bar[used[-1]])
        x = math.sqrt(abar) * init + math.sqrt(1 - abar) * noise
    for position in range(len(used) - 1, -1, -1):
        output = predict(x, used[position])
        eps, v = output.chunk(2, dim=1)
        abar = float(alpha_bar[used[position]])
        previous = float(alpha_bar[used[position - 1]]) if position else 1.0
        beta = 1 - abar / previous
        x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        mean = math.sqrt(previous) * beta / (1 - abar) * x0 + (1 - previous) * math.sqrt(1 - beta) / (1 - abar) * x
        if position == 0:
            return mean
        low = math.log(beta * (1 - previous) / (1 - abar))
        log_variance = (v + 1) / 2 * math.log(beta) + (1 - v) / 2 * low
        x = mean + (0.5 * log_variance).exp() * noise_like(generators, tuple(x.shape[1:]), x.device)
    return x


def dpmpp(
    predict: Predict,
    noise: Tensor,
    generators: list[torch.Generator],
    steps: int,
    init: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022), through diffusers. It is deterministic: ``generators`` are not used.

    Args:
        init: as in `ancestral`.

    Raises:
        ConfigError: no step is below ``strength`` * 1000.
    """
    return _by_scheduler(import_diffusers().DPMSolverMultistepScheduler, predict, noise, steps, init, strength)


def unipc(
    predict: Predict,
    noise: Tensor,
    generators: list[torch.Generator],
    steps: int,
    init: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """UniPC of order 2 (Zhao et al. 2023), through diffusers. It is deterministic: ``generators`` are not used.

    Args:
        init: as in `ancestral`.

    Raises:
        ConfigError: no step is below ``strength`` * 1000.
    """
    return _by_scheduler(import_diffusers().UniPCMultistepScheduler, predict, noise, steps, init, strength)


def _by_scheduler(kind: Any, predict: Predict, noise: Tensor, steps: int, init: Tensor | None, strength: float) -> Tensor:
    """A scheduler class of diffusers on the eps half of the output."""
    scheduler = kind(
        num_train_timesteps=STEPS, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
        prediction_type="epsilon", solver_order=2,
    )  # fmt: skip
    scheduler.set_timesteps(steps)  # on the CPU, where reading t waits for nothing
    first = int((scheduler.timesteps >= strength * STEPS).sum())  # they descend
    if first == len(scheduler.timesteps):
        raise _no_step_left(steps, strength)
    scheduler.set_begin_index(first)  # otherwise it looks for t among the steps
    x = noise
    if init is not None:
        x = scheduler.add_noise(init, noise, scheduler.timesteps[first].expand(len(noise)))
    for t in scheduler.timesteps[first:]:
        eps = predict(x, int(t)).chunk(2, dim=1)[0]
        x = scheduler.step(eps, t, x, return_dict=False)[0]
    return x


def _no_step_left(steps: int, strength: float) -> ConfigError:
    return ConfigError(
        f"none of the {steps} steps lies below t = {strength * STEPS:g}",
        where="sample.strength",
        fix="raise sample.strength or sample.steps",
    )


@torch.inference_mode()
def sample_latents(
    model: DiT,
    rows: Tensor,
    indices: list[int],
    *,
    seed: int,
    sampler: SamplerName,
    steps: int,
    guidance_scale: float,
    guided_channels: int = 3,
    guidance_interval: tuple[float, float] = (0, STEPS - 1),
    init: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Sample one latent for each row of the class table.

    Args:
        rows: ``int64 (B,)`` on the model's device.
        indices: number of each image in its run; with ``seed`` it determines the noise.
        sampler: a name in `ddsr_core.diffusion.names.SAMPLERS`.
        steps: network evaluations (pairs of them with guidance) from pure noise; a lower ``strength`` skips the first.
        guidance_scale: 1 for none; ``guidance_interval``: lowest and highest t (0 to 999) that it applies to.
        init: latents ``(B, C, h, w)`` in diffusion units to start from, noised to the highest step below
            ``strength`` * 1000; only the steps from there on are run. None for pure noise.
        strength: in (0, 1]; 1 exactly if ``init`` is None.

    Returns:
        ``float32 (B, C, h, w)``.

    Raises:
        ValueError: ``init`` with a strength of 1, or none with less.
        ConfigError: ``strength`` leaves no step.
    """
    if (init is None) != (strength == 1.0):
        raise ValueError("init requires a strength below 1, and a strength below 1 requires init")
    config = model.config
    generators = [image_generator(seed, index) for index in indices]
    noise = noise_like(generators, (config.in_channels, config.latent_px, config.latent_px), rows.device)
    predict = guided(model, rows, guidance_scale, guided_channels, guidance_interval)
    solve: Sampler = load_factory(SAMPLERS[sampler], "sample.sampler")
    return solve(predict, noise, generators, steps, init, strength)
