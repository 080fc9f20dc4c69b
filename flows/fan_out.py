"""SR networks trained side by side in processes of their own: each cell's stages are built before they are asked for."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context

from ddsr_core.config import Runtime
from ddsr_core.evaluation import EvaluateConfig
from ddsr_core.remote_store import open_store
from ddsr_core.sr.train import TrainSRConfig
from ddsr_core.store import Source, StageInput

PARENT_CHECK_S = 1.0


@dataclass(frozen=True)
class Work:
    """One network to train and measure: everything that another process needs to know."""

    home: str
    device: str
    recipe: TrainSRConfig
    inputs: Mapping[str, Source]
    evaluate: EvaluateConfig
    tests: Source


def as_source(item: StageInput) -> Source:
    """An input as what can be sent to another process."""
    return Source(item.path, item.digest)


def train_and_measure(work: Work) -> None:
    """Build both artifacts of a cell; what is there is left as it is."""
    from ddsr_core import evaluation
    from ddsr_core.sr import train

    store, runtime = open_store(work.home), Runtime(device=work.device)
    weights, _ = store.build(train.STAGE, work.recipe, work.inputs, runtime)
    store.build(evaluation.STAGE, work.evaluate, {"weights": weights, "test": work.tests}, runtime)


class FanOut:
    """Cells on their way; with one worker nothing is done ahead, and whoever asks for a cell builds it."""

    def __init__(self, pool: ProcessPoolExecutor | None) -> None:
        self.pool = pool

    def begin(self, work: Work) -> Future[None] | None:
        """Start on a cell, or leave it to whoever asks for it."""
        return self.pool.submit(train_and_measure, work) if self.pool else None


@contextmanager
def fan_out(workers: int) -> Iterator[FanOut]:
    """Processes for the cells of an experiment, each with its share of the cores.

    Results do not depend on their number but for the order of additions, which the number of cores of a process decides.
    A worker that stops leaves what any broken build leaves: the next one goes on there.
    """
    if workers == 1:
        yield FanOut(None)
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_begin_worker, initargs=(workers, os.getpid())
    )
    try:
        yield FanOut(pool)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _begin_worker(workers: int, parent: int) -> None:
    """Take a share of the cores, and end when the command that started it has ended, however it did."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)  # nobody waits for what it does; what it has begun goes on in the next run
