"""Working ahead on threads: order, bounded memory, errors."""

import threading
from collections.abc import Iterator

import pytest

from ddsr_core.parallel import prefetch


def test_results_come_in_order_though_later_ones_are_ready_first() -> None:
    second = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert second.wait(10)  # the first result waits for the second item to have been worked on
        elif item == 1:
            second.set()
        return item * item

    assert list(prefetch(work, range(9), workers=2)) == [item * item for item in range(9)]


def test_no_more_than_twice_the_workers_are_taken_ahead() -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    results = prefetch(str, items(), workers=3)
    for used in range(20):
        assert next(results) == str(used)
        assert len(taken) <= used + 6


def test_an_error_reaches_the_caller_in_its_turn() -> None:
    results = prefetch(lambda item: 1 // item, [1, 0, 1], workers=2)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
