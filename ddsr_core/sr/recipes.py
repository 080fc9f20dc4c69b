"""Published x4 training recipes. Schedules are given in published iterations and scaled to the requested number.

Published initializations (x2 networks, pretrained generators) are not used: by default every network starts from random
weights, so that everything it knows comes from the training set that is being compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from ddsr_core.sr.config import DiscriminatorName, GanConfig, GanName, Schedule


class Phase(NamedTuple):
    """One phase of training.

    Attributes:
        learning_rate: peak learning rate of Adam.
        iterations: published length of the phase, the unit of ``halve_at``.
        halve_at: iterations at which a step schedule halves the learning rate.
        schedule: how the learning rate decays.
    """

    learning_rate: float
    iterations: int
    halve_at: tuple[int, ...] = ()
    schedule: Schedule = "step"

    def rate_at(self, done: float) -> float:
        """Learning rate after the fraction ``done`` (0 to 1) of the phase."""
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * 0.5 ** sum(done * self.iterations >= mark for mark in self.halve_at)


class Recipe(NamedTuple):
    """Batch, crop and schedule of a network trained on L1."""

    batch_size: int
    lr_patch_px: int
    phase: Phase


_K = 1000
_SRFORMER_STEPS = (250 * _K, 400 * _K, 450 * _K, 475 * _K)

EDSR = Recipe(16, 48, Phase(1e-4, 300 * _K, (200 * _K,)))
RCAN = Recipe(16, 48, Phase(1e-4, 1000 * _K, (200 * _K, 400 * _K, 600 * _K, 800 * _K)))
RRDBNET = Recipe(16, 32, Phase(2e-4, 1000 * _K, schedule="cosine"))
SRFORMER = Recipe(64, 64, Phase(2e-4, 500 * _K, _SRFORMER_STEPS))
HIT_SR = Recipe(64, 64, Phase(5e-4, 500 * _K, _SRFORMER_STEPS))
#: Ours, for the small variants and trainings of thousands of iterations.
SMALL = Recipe(16, 24, Phase(1e-3, 500 * _K, _SRFORMER_STEPS, "cosine"))
#: Ours, for any other network.
DEFAULT = Recipe(16, 48, Phase(2e-4, 500 * _K, _SRFORMER_STEPS, "cosine"))


class GanRecipe(NamedTuple):
    """How any generator is trained against a discriminator.

    Attributes:
        batch_size, lr_patch_px: of both phases.
        warmup: the phase on L1 alone.
        adversarial: the phase against the discriminator. Both networks use its learning rate.
        beta2: of Adam.
        discriminator: ``unet`` predicts one logit per pixel, ``vgg`` one per image.
        relativistic: whether the discriminator predicts how much more real an image is than the average of the other kind.
        l1, perceptual, gan: weights of the generator's losses.
        blocks: weights of the five blocks of the perceptual trunk, each taken at its last convolution.
    """

    batch_size: int
    lr_patch_px: int
    warmup: Phase
    adversarial: Phase
    beta2: float
    discriminator: DiscriminatorName
    relativistic: bool
    l1: float
    perceptual: float
    gan: float
    blocks: tuple[float, float, float, float, float]


GAN_RECIPES: Mapping[GanName, GanRecipe] = {
    "real-esrgan": GanRecipe(
        batch_size=48,
        lr_patch_px=64,
        warmup=Phase(2e-4, 1000 * _K),
        adversarial=Phase(1e-4, 400 * _K),
        beta2=0.99,
        discriminator="unet",
        relativistic=False,
        l1=1.0,
        perceptual=1.0,
        gan=0.1,
        blocks=(0.1, 0.1, 1.0, 1.0, 1.0),
    ),
    "realsr": GanRecipe(
        batch_size=16,
        lr_patch_px=32,
        warmup=Phase(2e-4, 1000 * _K, schedule="cosine"),
        adversarial=Phase(1e-4, 60 * _K, (5 * _K, 10 * _K, 20 * _K, 30 * _K)),
        beta2=0.999,
        discriminator="vgg",
        relativistic=True,
        l1=0.01,
        perceptual=1.0,
        gan=0.005,
        blocks=(0.0, 0.0, 0.0, 0.0, 1.0),
    ),
}


def gan_recipe(config: GanConfig) -> GanRecipe:
    """The published recipe that a config names, with the config's own discriminator if it has one."""
    recipe = GAN_RECIPES[config.recipe]
    return recipe._replace(discriminator=config.discriminator or recipe.discriminator)
