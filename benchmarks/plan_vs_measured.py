"""What `ddsr plan` says against what a run takes, stage by stage: FLOPs, peak memory and seconds of a small run.

    python -m benchmarks.plan_vs_measured [--photos PHOTOS --test PHOTOS] [--set finetune.steps=40] [--toy]
    python -m benchmarks.plan_vs_measured --memory     # peak memory of small pieces of work, as torch's allocator counts it

One thread on the CPU. The run is made twice: once with FLOPs and memory watched (torch's own counter around the real
stages, and the peak of the resident memory that the operating system counts), once with the clock alone. Seconds are CPU
time, which other programs disturb least; so are the rates, which are measured in the same process (`ddsr bench`).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ddsr_core.config import StageConfig
from ddsr_core.evaluation import evaluate
from ddsr_core.imaging.demo_photos import write_demo_photos
from ddsr_core.imaging.photos import photo_source
from ddsr_core.pipeline.config import load_config
from ddsr_core.pipeline.distill import compare, distill
from ddsr_core.pipeline.plain import plain_backend
from ddsr_core.pipeline.request import Execution
from ddsr_core.pipeline.stages import Backend, Stages
from ddsr_core.planning.bench import SAMPLES, measure_machine
from ddsr_core.planning.config import load_machine
from ddsr_core.planning.counting import counting
from ddsr_core.planning.estimate import Plan, Request, plan
from ddsr_core.planning.photos import sizes_of_photos
from ddsr_core.storage.remote_store import open_store
from ddsr_core.storage.stage import Artifact, Stage, StageInput

#: A run of minutes that has every kind of stage of the preset `demo`.
SHORT = (
    "patches.stride_px=64", "finetune.steps=12", "finetune.sample_every=12", "finetune.lsr_adapt_every=12",
    "finetune.norm_every=6", "sample.count=14", "sample.oversample=2", "sample.batch_size=14", "sample.steps=10",
    "teacher.iterations=20", "sr.train.iterations=20", "sr.training_sets=['distilled']",
)  # fmt: skip
TOY = (*SHORT, "finetune.steps=2", "sample.count=7", "sample.steps=2", "teacher.iterations=2", "sr.train.iterations=2",
       "sr.archs=['edsr-small']")  # fmt: skip
MIB = 2**20


@dataclass
class Measured:
    """One stage as it ran. Bytes are the largest resident memory while it ran; ``before`` those when it began."""

    stage: str
    label: str
    flops: float = 0.0
    bytes: int = 0
    before: int = 0
    seconds: float = 0.0


def resident(field: str = "VmRSS") -> int:
    """Resident memory now, or its peak (``VmHWM``), bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def forget_peak() -> None:
    """Give freed memory back, and begin to watch the peak anew (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def one_after_another(
    items: Iterable[Any], prepare: Callable[[Any], Any], finish: Callable[[Any], Any], device: str
) -> Iterator[Any]:
    """`evaluator.overlapped` without threads, on which torch's counter does not see operators."""
    for item in items:
        yield finish(prepare(item))


@contextmanager
def watched(row: Measured) -> Iterator[None]:
    counter = FlopCounterMode(display=False)
    with mock.patch.object(evaluate, "overlapped", one_after_another), counter:
        yield
    row.flops = counter.get_total_flops()


@contextmanager
def timed(row: Measured) -> Iterator[None]:
    forget_peak()
    row.before, begun = resident(), time.process_time()
    with mock.patch.object(evaluate, "overlapped", one_after_another):
        yield
    row.seconds, row.bytes = time.process_time() - begun, resident("VmHWM")


def run(config: Any, photos: Path, tests: Path, home: Path, watch: Callable[[Measured], Any]) -> list[Measured]:
    """The run, each stage in ``watch``."""
    rows: list[Measured] = []
    plain = plain_backend(Execution(home=str(home), device="cpu"), open_store(str(home)))

    def build(stage: Stage, config: StageConfig, inputs: Mapping[str, StageInput], label: str = "") -> tuple[Artifact, bool]:
        rows.append(Measured(stage.name, label or stage.name))
        with watch(rows[-1]):
            built = plain.build(stage, config, inputs, label)
        print(f"{rows[-1]}", file=sys.stderr, flush=True)
        return built

    stages = Stages(config, Backend(build, str(home), "cpu"))
    distilled = distill(stages, photo_source(photos))
    compare(stages, distilled, photo_source(tests))
    return rows


def measure(config: Any, photos: Path, tests: Path) -> list[Measured]:
    """FLOPs, memory and seconds of each stage; two runs in homes of their own."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        rows = run(config, photos, tests, Path(first), watched)
        for row, again in zip(rows, run(config, photos, tests, Path(second), timed), strict=True):
            row.seconds, row.bytes, row.before = again.seconds, again.bytes, again.before
    return rows


def ratio(planned: float, measured: float) -> str:
    return "-" if not measured or not planned else f"{planned / measured:.2f}"


def table(planned: Plan, rows: list[Measured]) -> str:
    """Markdown: one row per stage; ratios are planned over measured."""
    lines = [
        "| stage | GFLOP planned | measured | ratio | peak MiB planned | measured | ratio | CPU s planned | measured | "
        "ratio |",
        "|" + "---|" * 10,
    ]
    for stage, row in zip(planned.stages, rows, strict=True):
        flops, memory = stage.tflop * 1e12, stage.host_gib * 2**30
        lines.append(
            f"| {row.stage} {row.label if row.label != row.stage else ''} | {flops / 1e9:.2f} | {row.flops / 1e9:.2f} | "
            f"{ratio(flops, row.flops)} | {memory / MIB:.0f} | {row.bytes / MIB:.0f} | {ratio(memory, row.bytes)} | "
            f"{stage.seconds:.2f} | {row.seconds:.2f} | {ratio(stage.seconds, row.seconds)} |"
        )
    total, taken = sum(stage.seconds for stage in planned.stages), sum(row.seconds for row in rows)
    flops, counted = sum(stage.tflop for stage in planned.stages) * 1e12, sum(row.flops for row in rows)
    lines.append(f"| all | {flops / 1e9:.1f} | {counted / 1e9:.1f} | {ratio(flops, counted)} | | | | {total:.1f} | "
                 f"{taken:.1f} | {ratio(total, taken)} |")  # fmt: skip
    return "\n".join(lines)


def allocated_peak(work: Callable[[], object]) -> int:
    """Largest sum of what torch's allocator gave out during ``work``, bytes; what it had given out before does not count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def memory_table() -> str:
    """Markdown: one row for each small piece of work that rates are fitted to, in the second of two steps."""
    lines = ["| work | peak MiB planned | torch's allocator | ratio |", "|---|---|---|---|"]
    for prepare in SAMPLES:
        with counting() as count:
            step = prepare("cpu")
            step()
            count.take()
            before = count.live_bytes
            step()
            planned = count.take().peak_bytes - before
        step = prepare("cpu")
        step()
        measured = allocated_peak(step)
        words = [prepare.func.__name__, *map(str, prepare.keywords.values())] if isinstance(prepare, partial) else [
            prepare.__name__]  # fmt: skip
        name = re.sub(r"latent_px=(\d+).*hidden=(\d+).*", r"\1 px, width \2", " ".join(words).strip("_"))
        lines.append(f"| {name} | {planned / MIB:.1f} | {measured / MIB:.1f} | {ratio(planned, measured)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="training photos (default: the demo's)")
    parser.add_argument("--test", type=Path, help="test photos (default: the demo's)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--toy", action="store_true", help="a few steps: tries the script, says nothing of seconds")
    parser.add_argument("--memory", action="store_true", help="peak memory of small pieces of work instead")
    options = parser.parse_args(arguments)
    if not sys.platform.startswith("linux"):
        raise SystemExit("Peak memory is read from /proc, which only Linux has.")
    torch.set_num_threads(1)
    if options.memory:
        print(memory_table())
        return
    with tempfile.TemporaryDirectory() as folder:
        shipped = write_demo_photos(Path(folder))
        photos, tests = options.photos or shipped[0], options.test or shipped[1]
        config = load_config("demo", overrides=[*(TOY if options.toy else SHORT), *options.set])
        libraries = resident()
        rows = measure(config, photos, tests)
        machine = load_machine("cpu") if options.toy else measure_machine("cpu", time.process_time, cores=1)
        print(machine.rates, machine.host, file=sys.stderr, flush=True)
        planned = plan(Request(config, sizes_of_photos(photos)[0], sizes_of_photos(tests)[0], machine))
    print(f"One thread of {machine.name}, {os.cpu_count()} cores; libraries {libraries / MIB:.0f} MiB.\n")
    print(table(planned, rows))


if __name__ == "__main__":
    main()
