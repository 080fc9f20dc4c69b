"""Stages and SR networks built without Prefect, in this process or in threads or processes of this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

from ddsr_core.config import Runtime, StageConfig, resolve_device
from ddsr_core.errors import ConfigError, DdsrError
from ddsr_core.parallel import RunParts, begin_worker
from ddsr_core.pipeline.request import Execution, Runner
from ddsr_core.pipeline.stages import Backend
from ddsr_core.progress import ProgressFactory, silent
from ddsr_core.reporters import tracked
from ddsr_core.storage.stage import Artifact, Stage, StageInput
from ddsr_core.storage.store import Store

#: Memory of a process that trains a small SR network.
NETWORK_BYTES = 2**30


def plain_backend(
    execution: Execution,
    store: Store,
    progress: ProgressFactory = silent,
    run: str = "",
    photo_cache: str | None = None,
) -> Backend:
    """A backend that builds stages in this process.

    Args:
        run: name of the run, shown to processes that wait for its artifacts.
        photo_cache: folder of a `ddsr_core.pseudo_labels.photo_cache`, relative to the home.

    Raises:
        ConfigError: the execution needs Prefect: Ray, or the GPU pool; or it reports to a program that is not installed.
    """
    require_plain(execution)
    tracked(execution.tracking("", ""), store.home)  # a missing package is found before any work is done
    device = resolve_device(execution.device)
    spread = None if execution.runner == "sequential" else spread_here(execution.runner, execution.workers)
    plain = Runtime(device=device, progress=progress, run=run)
    known = store.home / photo_cache if photo_cache else None

    def build(stage: Stage, config: StageConfig, inputs: Mapping[str, StageInput], label: str = "") -> tuple[Artifact, bool]:
        one_process = stage.on_gpu and device.startswith("cuda")  # one process keeps the GPU busy
        runtime = replace(
            plain, photo_cache=known if stage.photo_cache else None, run_parts=None if one_process else spread,
            reporter=tracked(execution.tracking(label or stage.name, stage.key(config, inputs)), store.home),
        )  # fmt: skip
        return store.build(stage, config, inputs, runtime)

    if beside(execution, device):
        side_by_side = spread_here("processes", idle_cores())
        return Backend(build, store.url, device, side_by_side, only_small=True, tracking=execution.tracking)
    networks = spread if execution.runner == "processes" else None
    return Backend(build, store.url, device, networks, tracking=execution.tracking)


def beside(execution: Execution, device: str) -> bool:
    """Whether SR networks with small steps are trained side by side although the runner is sequential."""
    return execution.side_by_side and execution.runner == "sequential" and device == "cpu" and idle_cores() > 1


def idle_cores() -> int:
    """Number of cores that this process may use, limited by the memory for one network per core."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else NETWORK_BYTES
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, free // NETWORK_BYTES))


def require_plain(execution: Execution) -> None:
    """Check that a run does not need Prefect.

    Raises:
        ConfigError: it does.
    """
    if execution.runner == "ray":
        raise ConfigError("Ray needs Prefect", where="runner", fix="leave out --no-prefect, or set --runner processes")
    if execution.gpu == "pool":
        raise ConfigError("the GPU pool needs Prefect", where="gpu", fix="leave out --no-prefect, or set --gpu local")


def spread_here(runner: Runner, workers: int) -> RunParts:
    """Work spread over threads or processes of this machine.

    Results do not depend on the number of workers, except for the order of additions, which depends on the number of cores
    of each process. If a worker stops, its build stays unfinished and the next run continues it.

    Raises:
        DdsrError: a worker process was ended, for example because memory was short; when the parts are consumed.
    """

    def spread(do: Callable[[Any], None], parts: Sequence[Any]) -> Iterator[None]:
        try:
            with _executor(runner, min(workers, len(parts))) as executor:
                for future in [executor.submit(do, part) for part in parts]:
                    future.result()
                    yield
        except BrokenExecutor as error:
            fix = "memory is most likely short: pass --in-turn or fewer --workers, and run again to continue"
            raise DdsrError("a worker process has ended before its work was done", fix=fix) from error

    return spread


@contextmanager
def _executor(runner: Runner, workers: int) -> Iterator[Executor]:
    """Waits for its workers at the end, but not after an error."""
    pool: Executor
    if runner == "threads":
        pool = ThreadPoolExecutor(workers)
    else:
        spawn = get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=begin_worker, initargs=(workers, os.getpid()))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
