"""Differences between SR networks trained on two sets, with their uncertainty.

Two networks are compared photo by photo and seed by seed. The mean difference has two sources of chance: the seeds of the
trainings and the choice of test photos. With D[s, p] the difference of seed s on photo p, its standard error is

    se^2 = var_s(mean_p D) / S + var_p(mean_s D) / P,

which counts the interaction of both twice and so errs on the side of caution. The interval is mean +- t * se, with the
97.5 % quantile t of Student's distribution at min(S, P) - 1 degrees of freedom. With fewer than `LEAST_SEEDS` seeds or
`LEAST_PHOTOS` test photos there is no interval: such a run is inconclusive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

LEAST_SEEDS, LEAST_PHOTOS = 3, 5
#: Confidence of the intervals.
CONFIDENCE = 0.95
Level = Literal["better", "worse", "equal", "unknown"]


@dataclass(frozen=True)
class Difference:
    """Mean difference in PSNR-Y, dB, of networks trained on two sets.

    Attributes:
        mean: of the first minus the second; positive where the first is better.
        half_width: of the interval around it; None if there are too few seeds or photos.
        seeds: seeds that both have.
        photos: test photos that both were measured on.
        by_seed: the mean over photos for each seed.
    """

    mean: float
    half_width: float | None
    seeds: int
    photos: int
    by_seed: tuple[float, ...] = ()

    @property
    def level(self) -> Level:
        """Whether the first set is better, worse or equal within the uncertainty; ``unknown`` without an interval."""
        if self.half_width is None:
            return "unknown"
        if abs(self.mean) <= self.half_width:
            return "equal"
        return "better" if self.mean > 0 else "worse"


def difference(ours: Mapping[int, Mapping[str, float]], theirs: Mapping[int, Mapping[str, float]]) -> Difference | None:
    """Difference between two training sets, over the seeds and photos that both have.

    Args:
        ours: seed -> test photo -> PSNR-Y in dB, of the networks trained on the first set.
        theirs: the same for the second set.

    Returns:
        None if they share no seed or no photo.

    >>> scores = {seed: {f"{photo}": 25.0 + photo for photo in range(6)} for seed in range(3)}
    >>> better = {seed: {name: value + 0.5 for name, value in row.items()} for seed, row in scores.items()}
    >>> difference(better, scores)
    Difference(mean=0.5, half_width=0.0, seeds=3, photos=6, by_seed=(0.5, 0.5, 0.5))
    """
    seeds = sorted(set(ours) & set(theirs))
    rows = [set(scores[seed]) for scores in (ours, theirs) for seed in seeds]
    photos = sorted(set.intersection(*rows)) if rows else []
    if not photos:
        return None
    table = np.array([[ours[seed][photo] - theirs[seed][photo] for photo in photos] for seed in seeds])
    mean, by_seed = float(table.mean()), tuple(float(value) for value in table.mean(axis=1))
    if len(seeds) < LEAST_SEEDS or len(photos) < LEAST_PHOTOS:
        return Difference(mean, None, len(seeds), len(photos), by_seed)
    variance = table.mean(axis=1).var(ddof=1) / len(seeds) + table.mean(axis=0).var(ddof=1) / len(photos)
    half_width = _quantile(min(len(seeds), len(photos))) * math.sqrt(variance)
    return Difference(mean, half_width, len(seeds), len(photos), by_seed)


def is_positive(gains: Sequence[float]) -> bool:
    """Whether the mean of one gain per seed is above 0 by more than chance explains; never with too few seeds.

    >>> is_positive([0.5, 0.6, 0.4]), is_positive([0.5, -0.1, 0.2]), is_positive([0.5, 0.6])
    (True, False, False)
    """
    return len(gains) >= LEAST_SEEDS and float(np.mean(gains)) > half_width(gains)


def half_width(values: Sequence[float]) -> float:
    """Half the width of Student's interval around the mean of at least two values.

    >>> round(half_width([0.1, 0.2, 0.3]), 4)
    0.2484
    """
    return _quantile(len(values)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def _quantile(samples: int) -> float:
    return float(stdtrit(samples - 1, (1 + CONFIDENCE) / 2))


def plural(count: int, noun: str) -> str:
    """
    >>> plural(1, "seed"), plural(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
