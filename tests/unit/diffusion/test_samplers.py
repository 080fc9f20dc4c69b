"""Samplers: a closed form as oracle, guidance, and results that do not depend on the batch."""

import pytest
import torch
from pydantic import ValidationError

from ddsr_core.diffusion.gaussian import STEPS, Schedule
from ddsr_core.diffusion.names import SAMPLERS
from ddsr_core.diffusion.samplers import (
    Predict,
    ancestral,
    dpmpp,
    guided,
    image_generator,
    noise_like,
    sample_latents,
    spaced_steps,
    unipc,
)
from ddsr_core.errors import ConfigError
from ddsr_core.sampling.config import SampleConfig
from tests.helpers.tiny_base import SHAPE, tiny_dit

SCHEDULE = Schedule()
SOLVERS = {"ancestral": ancestral, "dpmpp": dpmpp, "unipc": unipc}


def draw(sampler: str, indices: list[int], *, seed: int = 0, guidance_scale: float = 1.0) -> torch.Tensor:
    rows = torch.tensor([index % 3 for index in indices])
    return sample_latents(tiny_dit(), rows, indices, seed=seed, sampler=sampler, steps=4, guidance_scale=guidance_scale)


@pytest.mark.parametrize("sampler", ["ancestral", "dpmpp", "unipc"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_an_image_does_not_depend_on_its_batch(sampler: str, guidance_scale: float):
    together = draw(sampler, [0, 1, 2, 3, 4], guidance_scale=guidance_scale)
    for indices in ([3], [1, 4]):
        alone = draw(sampler, indices, guidance_scale=guidance_scale)
        torch.testing.assert_close(alone, together[indices], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", ["ancestral", "dpmpp", "unipc"])
def test_the_same_call_gives_the_same_bits_and_another_seed_or_index_another_image(sampler: str):
    first = draw(sampler, [0, 3])
    assert torch.equal(first, draw(sampler, [0, 3]))
    assert not torch.allclose(first[0], first[1])  # the same class row, another index
    assert not torch.allclose(first, draw(sampler, [0, 3], seed=1))


def exact_eps(x: torch.Tensor, t: int, mean: float, std: float) -> torch.Tensor:
    """The best possible noise prediction when x0 ~ N(mean, std^2)."""
    abar = SCHEDULE.alpha_bar[t]
    return (1 - abar).sqrt() * (x - abar.sqrt() * mean) / (abar * std**2 + 1 - abar)


@pytest.mark.parametrize(("sampler", "steps"), [("ancestral", 200), ("dpmpp", 25), ("unipc", 25)])
def test_with_the_exact_prediction_the_data_distribution_comes_out(sampler: str, steps: int):
    mean, std = 1.5, 0.4

    def predict(x: torch.Tensor, t: int) -> torch.Tensor:
        eps = exact_eps(x, t, mean, std)
        return torch.cat([eps, -torch.ones_like(eps)], dim=1)

    generators = [image_generator(0, index) for index in range(4)]
    noise = noise_like(generators, (4, 32, 32), torch.device("cpu"))
    found = SOLVERS[sampler](predict, noise, generators, steps)
    assert found.mean().item() == pytest.approx(mean, abs=0.02)
    assert found.std().item() == pytest.approx(std, rel=0.06)


def test_one_ancestral_step_equals_the_equations_with_the_learned_variance():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((1, 4, 2, 2), generator=generator)
    eps, v = torch.randn((2, 1, 4, 2, 2), generator=generator)
    v = v.tanh()
    called: list[int] = []

    def predict(x: torch.Tensor, t: int) -> torch.Tensor:
        called.append(t)
        return torch.cat([eps, v], dim=1)

    found = ancestral(predict, noise, [image_generator(7, 3)], 2)
    assert called == [999, 0]
    # Step 999 -> 0 of the respaced chain {0, 999}, then 0 -> x0, both by DDPM equation 7 with improved DDPM's variance.
    a1, a0 = SCHEDULE.alpha_bar[999].double(), SCHEDULE.alpha_bar[0].double()
    beta = 1 - a1 / a0
    x0 = (noise - (1 - a1).sqrt() * eps) / a1.sqrt()
    mean = (a0.sqrt() * beta * x0 + (1 - a0) * (1 - beta).sqrt() * noise) / (1 - a1)
    share = (v + 1) / 2
    log_variance = share * beta.log() + (1 - share) * (beta * (1 - a0) / (1 - a1)).log()
    drawn = torch.randn((4, 2, 2), generator=image_generator(7, 3))
    x = mean + (log_variance / 2).exp() * drawn
    expected = (x - (1 - a0).sqrt() * eps) / a0.sqrt()
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-3)


def test_scale_one_is_the_class_prediction_in_one_forward_pass():
    model, calls = tiny_dit(), []
    model.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    x, rows = torch.ones((2, 4, 4, 4)), torch.tensor([1, 2])
    with torch.no_grad():
        found = guided(model, rows, 1.0, 3)(x, 10)
        assert calls == [2]
        assert torch.equal(found, model(x, torch.tensor([10, 10]), rows))
        guided(model, rows, 1.5, 3)(x, 10)
    assert calls == [2, 2, 4]


@pytest.mark.parametrize("channels", [3, 4])
def test_guidance_extrapolates_the_first_channels_and_leaves_the_rest_to_the_class(channels: int):
    model = tiny_dit()
    x, t, rows = torch.ones((2, 4, 4, 4)), torch.tensor([10, 10]), torch.tensor([1, 2])
    with torch.no_grad():
        found = guided(model, rows, 4.0, channels)(x, 10)
        with_class = model(x, t, rows)
        without = model(x, t, torch.full_like(rows, SHAPE.null_row))
    expected = without + 4 * (with_class - without)
    torch.testing.assert_close(found[:, :channels], expected[:, :channels], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:, channels:], with_class[:, channels:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 5, 50, 1000])
def test_spaced_steps_rise_from_the_first_to_the_last(count: int):
    steps = spaced_steps(count)
    assert len(set(steps)) == count
    assert steps == sorted(steps)
    assert steps[-1] == 999
    assert count == 1 or steps[0] == 0


def test_guidance_holds_inside_its_interval_and_costs_nothing_outside():
    model, calls = tiny_dit(), []
    model.register_forward_hook(lambda _, args, __: calls.append((int(args[1][0]), len(args[0]))))
    x, rows = torch.ones((2, 4, 4, 4)), torch.tensor([1, 2])
    with torch.no_grad():
        inside, everywhere = guided(model, rows, 4.0, 3, (100, 500)), guided(model, rows, 4.0, 3)
        for t in (99, 501):
            assert torch.equal(inside(x, t), model(x, torch.tensor([t, t]), rows))
        for t in (100, 500):
            assert torch.equal(inside(x, t), everywhere(x, t))
        calls.clear()
        sample_latents(
            model, rows, [0, 1], seed=0, sampler="ancestral", steps=5, guidance_scale=4.0, guidance_interval=(250, 500)
        )
    assert calls == [(999, 2), (749, 2), (500, 4), (250, 4), (0, 2)]


#: Steps below t = 500 of eight, and the t that a init is noised to.
BELOW_HALF = {"ancestral": [428, 285, 143, 0], "dpmpp": [500, 375, 250, 125], "unipc": [500, 375, 250, 125]}


@pytest.mark.parametrize("sampler", ["ancestral", "dpmpp", "unipc"])
def test_a_start_is_noised_to_the_first_step_that_is_left(sampler: str):
    strength = 0.5005  # t = 500 itself is left
    noise = noise_like([image_generator(0, index) for index in range(3)], (4, 2, 2), torch.device("cpu"))
    init = torch.full_like(noise, 0.7)
    seen: list[tuple[int, torch.Tensor]] = []

    def predict(x: torch.Tensor, t: int) -> torch.Tensor:
        seen.append((t, x))
        return torch.zeros((3, 8, 2, 2))

    generators = [image_generator(0, index) for index in range(3)]
    SOLVERS[sampler](predict, noise, generators, 8, init, strength)
    assert [t for t, _ in seen] == BELOW_HALF[sampler]
    abar = SCHEDULE.alpha_bar[seen[0][0]]
    torch.testing.assert_close(seen[0][1], abar.sqrt() * init + (1 - abar).sqrt() * noise, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sampler", "steps"), [("ancestral", 200), ("dpmpp", 40), ("unipc", 40)])
@pytest.mark.parametrize("strength", [0.2, 0.6, 0.95])
def test_with_the_exact_prediction_a_start_in_the_data_stays_in_it(sampler: str, steps: int, strength: float):
    mean, std = 1.5, 0.4

    def predict(x: torch.Tensor, t: int) -> torch.Tensor:
        eps = exact_eps(x, t, mean, std)
        return torch.cat([eps, -torch.ones_like(eps)], dim=1)

    generators = [image_generator(0, index) for index in range(4)]
    noise = noise_like(generators, (4, 32, 32), torch.device("cpu"))
    init = mean + std * torch.randn(noise.shape, generator=torch.Generator().manual_seed(5))
    found = SOLVERS[sampler](predict, noise, generators, steps, init, strength)
    assert found.mean().item() == pytest.approx(mean, abs=0.02)
    assert found.std().item() == pytest.approx(std, rel=0.06)
    kept = torch.corrcoef(torch.stack([found.flatten(), init.flatten()]))[0, 1].item()
    # How much of the init is left after noising to t, in the best estimate of x0: the signal's share of the variance.
    abar = SCHEDULE.alpha_bar[int(strength * STEPS) - 1].item()
    left = abar * std**2 / (abar * std**2 + 1 - abar)
    assert kept == pytest.approx(left if sampler == "ancestral" else left**0.5, abs=0.08)


@pytest.mark.parametrize("sampler", ["ancestral", "dpmpp", "unipc"])
def test_a_start_image_does_not_depend_on_its_batch(sampler: str):
    init = torch.randn((4, 4, 4, 4), generator=torch.Generator().manual_seed(2))

    def from_start(indices: list[int]) -> torch.Tensor:
        rows = torch.tensor([index % 3 for index in indices])
        return sample_latents(
            tiny_dit(),
            rows,
            indices,
            seed=0,
            sampler=sampler,
            steps=6,
            guidance_scale=1.0,
            init=init[indices],
            strength=0.5,
        )

    together = from_start([0, 1, 2, 3])
    assert torch.equal(together, from_start([0, 1, 2, 3]))
    torch.testing.assert_close(from_start([2]), together[[2]], rtol=1e-3, atol=1e-3)


def test_a_strength_that_leaves_no_step_is_refused():
    noise = torch.zeros((1, 4, 2, 2))
    with pytest.raises(ConfigError, match="none of the 25 steps lies below t = 30"):
        dpmpp(lambda x, t: torch.cat([x, x], 1), noise, [image_generator(0, 0)], 25, noise, 0.03)
    with pytest.raises(ConfigError, match="none of the 1 steps"):
        ancestral(lambda x, t: torch.cat([x, x], 1), noise, [image_generator(0, 0)], 1, noise, 0.5)


def test_a_start_and_full_strength_contradict_each_other():
    with pytest.raises(ValueError, match="init"):
        sample_latents(
            tiny_dit(), torch.tensor([0]), [0], seed=0, sampler="dpmpp", steps=2, guidance_scale=1.0,
            init=torch.zeros((1, 4, 4, 4)),
        )  # fmt: skip


def constant(
    predict: Predict, noise: torch.Tensor, generators: list[torch.Generator], steps: int, init: torch.Tensor | None,
    strength: float,
) -> torch.Tensor:  # fmt: skip
    """The file of a new sampler: the noise, minus the prediction of its only step."""
    return noise - steps * predict(noise, STEPS - 1).chunk(2, dim=1)[0]


def test_a_new_sampler_is_a_function_and_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(SAMPLERS, "constant", f"{__name__}:constant")
    assert SampleConfig(sampler="constant").sampler == "constant"
    images = draw("constant", [2, 5])
    shape, rows = (SHAPE.in_channels, SHAPE.latent_px, SHAPE.latent_px), torch.tensor([2, 2])
    noise = noise_like([image_generator(0, index) for index in (2, 5)], shape, torch.device("cpu"))
    with torch.inference_mode():
        eps = tiny_dit()(noise, torch.full((2,), STEPS - 1), rows).chunk(2, dim=1)[0]
    torch.testing.assert_close(images, noise - 4 * eps)


def test_an_unknown_sampler_is_refused_with_the_known_ones():
    with pytest.raises(ValidationError, match="use one of ancestral, dpmpp"):
        SampleConfig(sampler="ddim")
