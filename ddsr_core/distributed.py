"""Several processes share each training step, one GPU per process, through accelerate.

Every process draws the same batch and computes an equal part of it, and gradients are averaged. The loss curve is therefore
that of one process with the same batch. In fine-tuning, predictions are gathered for the minimax losses, whose minima and
maxima run over the whole batch.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from ddsr_core import errors
from ddsr_core.config import Runtime
from ddsr_core.progress import Bar
from ddsr_core.reporters import OpenReporter
from ddsr_core.storage.files import write_json
from ddsr_core.storage.stage import RESUME


class ProcessGroup(Protocol):
    """The processes that share a step; ``rank`` is the number of this one, 0 to ``count`` - 1."""

    rank: int
    count: int

    def gather(self, part: Tensor) -> Tensor:
        """The parts of all processes, in order of rank, along the first dimension. Without gradient."""

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""


class SingleProcess:
    """One process."""

    rank, count = 0, 1

    def gather(self, part: Tensor) -> Tensor:
        return part.detach()

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """The mean over one process."""


class Accelerated:
    """The processes of an ``accelerate.Accelerator``."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.rank, self.count = accelerator.process_index, accelerator.num_processes

    def gather(self, part: Tensor) -> Tensor:
        gathered: Tensor = self.accelerator.gather(part.detach().contiguous())
        return gathered

    def average_(self, tensors: Sequence[Tensor]) -> None:
        # A single message: an adapter is a few megabytes in hundreds of vectors.
        flat = self.accelerator.reduce(torch.cat([tensor.flatten() for tensor in tensors]), reduction="mean")
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


#: What every process runs: ``work(group, runtime)``. It is pickled: a function of a module, or a `functools.partial` of one.
Work = Callable[[ProcessGroup, Runtime], None]


def run_together(work: Work, count: int, out: Path, runtime: Runtime) -> None:
    """Run ``work`` in ``count`` processes and wait. Process 0 reports progress and curves.

    Raises:
        DdsrError: the error of a process; the others are stopped.
    """
    failure = out / RESUME / "failure.json"
    failure.unlink(missing_ok=True)
    messages: Any = get_context("spawn").SimpleQueue()
    address = f"127.0.0.1:{_free_port()}"
    # The children get a parent-death signal, so that a killed run leaves no process behind that still writes.
    arguments = (count, address, work, failure, runtime.device, runtime.reporter, messages)
    processes = start_processes(_child, arguments, nprocs=count, join=False, start_method="spawn")
    try:
        _show(processes, messages, runtime)
    except (ProcessRaisedException, ProcessExitedException) as error:
        if failure.exists():
            values = json.loads(failure.read_text())
            kind: type[errors.DdsrError] = getattr(errors, values["kind"])
            raise kind(values["what"], where=values["where"], fix=values["fix"]) from error
        raise


def _child(
    rank: int, count: int, address: str, work: Work, failure: Path, device: str, reporter: OpenReporter, messages: Any
) -> None:
    host, port = address.split(":")
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR=host, MASTER_PORT=port,
    )  # fmt: skip
    from accelerate import Accelerator  # reads the environment that was set above

    on_cpu = device == "cpu"
    accelerator = Accelerator(cpu=on_cpu)
    own = Runtime(device=str(accelerator.device))
    if rank == 0:
        own = replace(own, progress=_reporting(messages), reporter=reporter)
    try:
        work(Accelerated(accelerator), own)
    except errors.DdsrError as error:
        values = {"kind": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix}
        write_json(failure, values)
        raise
    finally:
        accelerator.end_training()


def _show(processes: Any, messages: Any, runtime: Runtime) -> None:
    """Forward the progress of process 0 until all processes have ended."""
    bar: Bar | None = None
    shown: Any = None
    try:
        ended = False
        while not ended:
            ended = processes.join(timeout=0.2)
            while not messages.empty():
                kind, value = messages.get()
                if kind == "open":
                    shown = runtime.progress(value.pop("title"), **value)
                    bar = shown.__enter__()
                elif bar is not None and kind == "advance":
                    bar.advance(value)
                elif bar is not None:
                    bar.note(value)
    finally:
        if shown is not None:
            shown.__exit__(None, None, None)


def _reporting(messages: Any) -> Any:
    """A `ProgressFactory` that reports to the parent process."""

    class Sender:
        def advance(self, amount: int = 1) -> None:
            messages.put(("advance", amount))

        def note(self, text: str) -> None:
            messages.put(("note", text))

    @contextmanager
    def progress(title: str, *, total: int, unit: str = "items", done: int = 0) -> Iterator[Bar]:
        messages.put(("open", {"title": title, "total": total, "unit": unit, "done": done}))
        yield Sender()

    return progress


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
