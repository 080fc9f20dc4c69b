"""SR networks trained side by side: each cell's stages are built before they are asked for.

Without Prefect in processes of this machine; under Prefect on the task runner that the run names (`flows.train_networks`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from ddsr_core.config import Runtime, resolve_device
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.parallel import begin_worker
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.storage.remote_store import open_store
from ddsr_core.storage.store import InputRef


class Work(BaseModel):
    """One network to train and measure: everything that another process needs to know."""

    model_config = ConfigDict(frozen=True)
    label: str
    home: str
    device: str
    recipe: TrainSRConfig
    inputs: dict[str, InputRef]
    evaluate: EvaluateConfig
    tests: InputRef


def train_and_measure(work: Work) -> None:
    """Build both artifacts of a cell; what is there is left as it is."""
    from ddsr_core.evaluation import evaluate as evaluation
    from ddsr_core.sr import train_sr

    store = open_store(work.home)
    runtime = Runtime(device=resolve_device(work.device), run=work.label)
    inputs = {name: ref.source(store) for name, ref in work.inputs.items()}
    weights, _ = store.build(train_sr.STAGE, work.recipe, inputs, runtime)
    store.build(evaluation.STAGE, work.evaluate, {"weights": weights, "test": work.tests.source(store)}, runtime)


class Begun(Protocol):
    """A cell on its way."""

    def done(self) -> bool: ...
    def result(self) -> object: ...


class FanOut(Protocol):
    """Takes cells; None: whoever asks for a cell builds it."""

    def begin(self, work: Work) -> Begun | None: ...


class OneByOne:
    """Nothing is done ahead."""

    def begin(self, work: Work) -> None:
        return None


class InProcesses:
    """Cells in processes of this machine."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def begin(self, work: Work) -> Begun:
        return self.pool.submit(train_and_measure, work)


class Together:
    """Cells are gathered, and all begun when the first is waited for."""

    def __init__(self, run_all: Callable[[list[Work]], None]) -> None:
        self.run_all = run_all
        self.gathered: list[Work] = []

    def begin(self, work: Work) -> Begun:
        self.gathered.append(work)
        return self

    def done(self) -> bool:
        return not self.gathered

    def result(self) -> None:
        works, self.gathered = self.gathered, []
        if works:
            self.run_all(works)


@contextmanager
def fan_out(workers: int) -> Iterator[FanOut]:
    """Processes for the cells of an experiment, each with its share of the cores.

    Results do not depend on their number but for the order of additions, which the number of cores of a process decides.
    A worker that stops leaves what any broken build leaves: the next one goes on there.
    """
    if workers == 1:
        yield OneByOne()
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=begin_worker, initargs=(workers, os.getpid())
    )
    try:
        yield InProcesses(pool)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
