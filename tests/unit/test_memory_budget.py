"""Memory that threads share: nobody takes more than there is, and what is larger than all of it runs alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ddsr_core import parallel
from ddsr_core.parallel import MemoryBudget


def test_the_sum_of_what_is_held_never_exceeds_the_budget() -> None:
    budget, held, most, lock = MemoryBudget(10), [0], [0], threading.Lock()

    def use(amount: int) -> None:
        with budget.reserve(amount):
            with lock:
                held[0] += min(amount, 10)
                most[0] = max(most[0], held[0])
            with lock:
                held[0] -= min(amount, 10)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, [3, 4, 9, 1, 25, 10, 2, 6] * 50))
    assert held == [0]
    assert 0 < most[0] <= 10


def test_an_error_gives_the_memory_back() -> None:
    budget = MemoryBudget(5)
    for _ in range(3):
        with pytest.raises(ValueError, match="decoder"), budget.reserve(5):
            raise ValueError("decoder")
    with budget.reserve(5):
        pass


def test_worker_processes_divide_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_worker_processes", 2)
    budget, inside = MemoryBudget(10), threading.Event()

    def second() -> None:
        with budget.reserve(1):
            inside.set()

    with budget.reserve(5):  # all of this process's half
        thread = threading.Thread(target=second)
        thread.start()
        assert not inside.wait(0.2)
    assert inside.wait(10)
    thread.join()
