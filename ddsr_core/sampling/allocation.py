"""How the images of a distilled set are divided among the pseudo-labels."""

from __future__ import annotations

from ddsr_core.sampling.config import Allocation


def images_per_label(count: int, sizes: list[int], allocation: Allocation = "equal") -> list[int]:
    """Images per pseudo-label, equal or proportional to ``sizes`` (rounded down); the remainder goes to the largest.

    Of equally large clusters the lower label comes first.

    >>> images_per_label(10, [5, 9, 9])
    [3, 4, 3]
    >>> images_per_label(10, [30, 60, 10], "proportional")
    [3, 6, 1]
    """
    parts = [1] * len(sizes) if allocation == "equal" else sizes
    shares = [count * part // sum(parts) for part in parts]
    for label in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))[: count - sum(shares)]:
        shares[label] += 1
    return shares
