"""The networks' published x4 recipes: their schedules are given in iterations and shrink to the budget asked for.

Published starts (x2 networks, pretrained generators) are not taken over: every network here starts from nothing, so that
all it knows comes from the data set it is compared on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

Schedule = Literal["cosine", "step"]
GanName = Literal["real-esrgan", "realsr"]


class Phase(NamedTuple):
    """A stretch of training.

    Attributes:
        learning_rate: of Adam, at its highest.
        iterations: published length; ``halve_at`` is counted in these.
        halve_at: iterations at which a step schedule halves the rate.
        schedule: how the rate falls.
    """

    learning_rate: float
    iterations: int
    halve_at: tuple[int, ...] = ()
    schedule: Schedule = "step"

    def rate_at(self, done: float) -> float:
        """Learning rate once a share ``done`` (0 … 1) of the phase is over."""
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

#: By the beginning of the network's name, the longest that fits.
_PUBLISHED: Mapping[str, Recipe] = {
    "edsr": Recipe(16, 48, Phase(1e-4, 300 * _K, (200 * _K,))),
    "rcan": Recipe(16, 48, Phase(1e-4, 1000 * _K, (200 * _K, 400 * _K, 600 * _K, 800 * _K))),
    "srformer": Recipe(64, 64, Phase(2e-4, 500 * _K, _SRFORMER_STEPS)),
    "hit": Recipe(64, 64, Phase(5e-4, 500 * _K, _SRFORMER_STEPS)),
    "rrdb": Recipe(16, 32, Phase(2e-4, 1000 * _K, schedule="cosine")),
}
#: Ours, for the small networks (names with "small" in them) and budgets of thousands of iterations.
_SMALL = Recipe(16, 24, Phase(1e-3, 500 * _K, _SRFORMER_STEPS, "cosine"))
#: Ours, for a network of the user's own.
_UNKNOWN = Recipe(16, 48, Phase(2e-4, 500 * _K, _SRFORMER_STEPS, "cosine"))


class GanRecipe(NamedTuple):
    """How a generator is trained against a discriminator, whatever the generator.

    Attributes:
        batch_size, lr_patch_px: of both phases.
        warmup: the phase of L1 alone.
        adversarial: the phase against the discriminator; its rate is that of both networks.
        beta2: of Adam.
        discriminator: ``unet`` has a logit a pixel, ``vgg`` one an image.
        relativistic: whether it says how much more real an image is than the average of the other kind.
        l1, perceptual, gan: weights of the generator's losses.
        blocks: weights of the last convolution of the perceptual trunk's five blocks.
    """

    batch_size: int
    lr_patch_px: int
    warmup: Phase
    adversarial: Phase
    beta2: float
    discriminator: Literal["unet", "vgg"]
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


def recipe_of(arch: str) -> Recipe:
    """The recipe of a network on L1, by its name in `architectures.ARCHITECTURES` or as ``module:Class``."""
    if "small" in arch:
        return _SMALL
    fitting = [name for name in _PUBLISHED if arch.startswith(name)]
    return _PUBLISHED[max(fitting, key=len)] if fitting else _UNKNOWN


class Plan(NamedTuple):
    """A training as it will be run.

    Attributes:
        batch_size, lr_patch_px: of every step.
        first, second: L1, and against the discriminator (None without one).
        switch: the step (counted from 0) that the second phase starts at; all iterations without one.
        iterations: steps of both.
    """

    batch_size: int
    lr_patch_px: int
    first: Phase
    second: Phase | None
    switch: int
    iterations: int

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step (counted from 0): the published schedule of its phase, shrunk to the phase's length."""
        if self.second is None or step < self.switch:
            return self.first.rate_at(step / self.switch)
        return self.second.rate_at((step - self.switch) / (self.iterations - self.switch))
