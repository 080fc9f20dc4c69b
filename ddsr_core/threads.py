"""How torch's threads wait for each other: set before torch is imported, hence from the package's `__init__`."""

from __future__ import annotations

import os

#: Environment variables that control how threads wait. A value set by the user is kept.
OWN_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
#: Iterations that a waiting thread of libgomp spins before it sleeps.
SPIN_COUNT = "1000"


def shorten_spin() -> None:
    """Let waiting OpenMP threads sleep soon.

    By default a thread that waits for the others keeps its core busy. On a machine that does anything else, the others then
    wait for that core, and a training step takes up to twenty times as long. A short spin costs nothing on an idle machine
    (``benchmarks/threads.py``). Works with libgomp, which PyTorch's Linux wheels use, if torch is not imported yet.
    """
    if not any(name in os.environ for name in OWN_SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
