"""The plan of a training: the published recipe of the network, overridden by the values of the config."""

from __future__ import annotations

from typing import NamedTuple

from ddsr_core.sr.architectures import find_architecture
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.recipes import Phase, gan_recipe


class Plan(NamedTuple):
    """Batches, crops and learning rates of every step.

    Attributes:
        batch_size: crops per step.
        lr_patch_px: height and width of the LR crops.
        first: the phase on L1.
        second: the phase against the discriminator; None without one.
        switch: first step (counted from 0) of the second phase; equal to ``iterations`` without one.
        iterations: steps of both phases together.
    """

    batch_size: int
    lr_patch_px: int
    first: Phase
    second: Phase | None
    switch: int
    iterations: int

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step (counted from 0): the published schedule of its phase, scaled to the phase's length."""
        if self.second is None or step < self.switch:
            return self.first.rate_at(step / self.switch)
        return self.second.rate_at((step - self.switch) / (self.iterations - self.switch))


def plan_of(config: TrainSRConfig) -> Plan:
    """The plan of a config.

    Raises:
        ConfigError: unknown network.
    """
    switch, second = config.iterations, None
    if config.gan:
        published = gan_recipe(config.gan)
        batch_size, lr_patch_px, first = published.batch_size, published.lr_patch_px, published.warmup
        switch = round(config.gan.warmup * config.iterations)
        second = published.adversarial
        second = second._replace(learning_rate=config.gan.learning_rate or second.learning_rate)
        second = second._replace(schedule=config.schedule or second.schedule)
    else:
        batch_size, lr_patch_px, first = find_architecture(config.arch).recipe
    first = first._replace(learning_rate=config.learning_rate or first.learning_rate)
    first = first._replace(schedule=config.schedule or first.schedule)
    crops = config.batch_size or batch_size, config.lr_patch_px or lr_patch_px
    return Plan(*crops, first, second, switch, config.iterations)
