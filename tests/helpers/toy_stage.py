"""A stage for tests of the store, light enough for child processes: it writes numbered files and notes each one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from ddsr_core.config import Runtime, StageConfig
from ddsr_core.storage.files import write_atomically
from ddsr_core.storage.stage import RESUME, Source, Stage, StageResult


class CountConfig(StageConfig):
    """A stage that writes numbered files, noting each call beside the home.

    The environment's TOY_PAUSE names the file after which it waits until the file TOY_PAUSE_UNTIL exists.
    """

    files: int = Field(3)


def count_up(config: CountConfig, *, source: Path, out: Path, runtime: Runtime) -> StageResult:
    done = out / RESUME / "done"
    for index in range(config.files):
        if not (done / str(index)).exists():
            with source.open("a") as log:
                log.write(f"{index}\n")
            write_atomically(out / f"{index}.txt", str(index).encode())
            write_atomically(done / str(index), b"")
            if os.environ.get("TOY_PAUSE") == str(index):
                wait_for(Path(os.environ["TOY_PAUSE_UNTIL"]).exists)
    return StageResult({"files": config.files})


TOY = Stage("toy", 1, count_up, CountConfig)


def inputs(log: Path) -> dict[str, Source]:
    return {"source": Source(log, "digest")}


def key_of(log: Path) -> str:
    return TOY.key(CountConfig(), inputs(log))


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)
