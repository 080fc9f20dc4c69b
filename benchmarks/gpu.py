"""DiT-XL/2-512 with DiffFit on one GPU: fine-tuning steps and sampling, relative to the GPU's rate of bf16 products.

    python -m benchmarks.gpu [--seconds 540] [--out gpu.json]
    python -m benchmarks.gpu --device cpu --tiny --no-compile     # a few seconds: checks the script, not the speed

Weights are random: speed does not depend on them. Only PyTorch and NumPy are needed; no file is read, nothing is
downloaded, and ddsr's other dependencies may be absent. The most informative rows come first; rows that do not fit into
the time limit are listed at the end. Every row is written to the JSON file as soon as it is measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.torch_alone import install
from ddsr_core.errors import DdsrError

if TYPE_CHECKING:
    from benchmarks.gpu_work import Cell, Size

#: Seconds that must be left for a measurement to begin.
TRAIN_S, SAMPLE_S, COMPILE_S = 15.0, 20.0, 120.0
GUIDANCE = (1.0, 2.5)
Row = dict[str, Any]


class OutOfTimeError(Exception):
    """The time limit was reached during a measurement."""


def _stop(*_: object) -> None:
    raise OutOfTimeError


class Report:
    """The rows so far and the remaining time."""

    def __init__(self, seconds: float, out: Path) -> None:
        self.seconds, self.deadline, self.out = seconds, time.monotonic() + seconds, out
        self.facts: Row = {}
        self.rows: dict[str, list[Row]] = {"train": [], "sample": []}
        self.left_out: list[str] = []

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def attempt(self, kind: str, name: str, needs: float, work: Callable[[], Row]) -> None:
        """Measure, unless too little time is left; a failure becomes a row with its message."""
        if self.left() < needs:
            self.left_out.append(name)
            return
        try:
            row = work()
        except OutOfTimeError:
            self.left_out.append(name)
            return
        except torch.OutOfMemoryError:
            row = {"failed": "out of memory"}
        except (RuntimeError, DdsrError) as error:  # of a compiler that is missing, say: the other rows still count
            row = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        self.rows[kind].append({"name": name, **row})
        print(f"{name}: {summary(row)}", flush=True)
        self.save()

    def save(self) -> None:
        text = json.dumps({**self.facts, **self.rows, "left_out": self.left_out}, indent=1)
        self.out.write_text(text + "\n")


def summary(row: Row) -> str:
    if "failed" in row:
        return str(row["failed"])
    rate = f"{row['samples_s']:.1f} samples/s" if "samples_s" in row else f"{row['images_s']:.2f} images/s"
    return f"{rate}, {row['tflop_s']:.3g} TFLOP/s, {row['share']:.0%}"


def name_of(cell: Cell) -> str:
    words = [f"train, batch {cell.batch}"]
    words += [word for word, on in (("L_SR", cell.lsr), ("checkpointing", cell.checkpointing)) if on]
    return ", ".join([*words, "compiled"] if cell.compiled else words)


def plan(batches: Sequence[int], compiled: bool) -> list[Cell]:
    """All training settings, the most informative first, compiled ones last."""
    from benchmarks.gpu_work import Cell

    informative = (batches[0], batches[-2]) if len(batches) > 2 else tuple(batches)
    ordered = [*informative, *(batch for batch in batches if batch not in informative)]
    return [
        Cell(batch, lsr, checkpointing, as_compiled)
        for as_compiled in ((False, True) if compiled else (False,))
        for checkpointing in (False, True)
        for batch in ordered
        for lsr in (True, False)
    ]


def measure(report: Report, size: Size, device: str, compiled: bool) -> None:
    from benchmarks import gpu_work as work

    models = work.Models(size, device)
    tflop = work.count_tflop(size)
    ceiling = work.matmul_rate(size.matmul, models.device)
    report.facts |= {"matmul_bf16_tflop_s": ceiling, "matmul_size": size.matmul, "tflop_a_sample": tflop}
    data = models.training_set()

    def train(cell: Cell) -> None:
        work.free_memory(models.device)
        needs = COMPILE_S if cell.compiled else TRAIN_S
        report.attempt("train", name_of(cell), needs, lambda: work.train(models, data, cell, tflop, ceiling))

    def sample(guidance: float) -> None:
        work.free_memory(models.device)
        seconds = min(report.seconds / 4, report.left() - SAMPLE_S / 2)
        name = f"sample, guidance {guidance:g}"
        report.attempt("sample", name, SAMPLE_S, lambda: work.sample(models, guidance, tflop, ceiling, seconds))

    cells = plan(size.batches, compiled)
    for cell in cells[:4]:
        train(cell)
    for guidance in GUIDANCE:
        sample(guidance)
    for cell in cells[4:]:
        train(cell)


def tables(facts: Row, rows: dict[str, list[Row]], left_out: list[str]) -> str:
    """The results as Markdown."""
    if "matmul_bf16_tflop_s" not in facts:
        return "Nothing was measured: the time limit was reached before the models were built."
    ceiling, tflop = facts["matmul_bf16_tflop_s"], facts["tflop_a_sample"]
    size = facts["matmul_size"]
    lines = [
        f"{facts['machine']}, torch {facts['torch']}. A bf16 product of {size}x{size} matrices: {ceiling:.3g} TFLOP/s. "
        "Shares are relative to it.",
        f"TFLOP per sample, counted, not timed: forward {tflop['forward']:.3g}, with DiffFit's backward "
        f"{tflop['train']:.3g}, L_SR {tflop['lsr']:.3g} on average, decoding {tflop['sd_decode']:.3g}. Recomputed blocks "
        "are not counted. 70,000 samples are optimizer steps alone; sample sheets, texture measurements and checkpoints are "
        "extra.",
        "",
        "| batch | L_SR (TAESD) | checkpointing | compiled | samples/s | TFLOP/s | share | peak GiB | 70,000 samples, min "
        "(extrapolated) |",
        "|" + "---|" * 9,
    ]
    for row in rows["train"]:
        if "failed" in row:
            lines.append(f"| {row['name']}: {row['failed']} |" + " |" * 8)
            continue
        flags = " | ".join("yes" if row[key] else "no" for key in ("lsr", "checkpointing", "compiled"))
        lines.append(
            f"| {row['batch']} | {flags} | {row['samples_s']:.1f} | {row['tflop_s']:.3g} | {row['share']:.0%} | "
            f"{gib(row)} | {row['minutes_70k_extrapolated']:.1f} |"
        )
    lines += [
        "",
        "| images | sampler, steps | guidance | batch | seconds | images/s | TFLOP/s | share | peak GiB | 420 images, s |",
        "|" + "---|" * 10,
    ]
    for row in rows["sample"]:
        if "failed" in row:
            lines.append(f"| {row['name']}: {row['failed']} |" + " |" * 9)
            continue
        scaled = "" if row["images"] == 420 else " (extrapolated)"
        lines.append(
            f"| {row['images']} | {row['sampler']}, {row['steps']} | {row['guidance']:g} | {row['batch']} | "
            f"{row['seconds']:.1f} | {row['images_s']:.2f} | {row['tflop_s']:.3g} | {row['share']:.0%} | {gib(row)} | "
            f"{row['seconds_420']:.1f}{scaled} |"
        )
    lines += ["", f"Not measured within the time limit: {'; '.join(left_out)}."] if left_out else []
    return "\n".join(lines)


def gib(row: Row) -> str:
    return "–" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=540, help="time limit; rows measured by then are reported")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("No CUDA device. To try the script without one: --device cpu --tiny --no-compile")
        return 2
    report = Report(options.seconds, options.out)
    absent = install()
    from benchmarks.gpu_work import FULL, TINY

    machine = torch.cuda.get_device_name() if on_gpu else f"CPU {platform.machine()}"
    report.facts |= {"machine": machine, "torch": torch.__version__, "stand_ins": absent, "tiny": options.tiny}
    signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, options.seconds)
    try:
        measure(report, TINY if options.tiny else FULL, options.device, options.compile)
    except OutOfTimeError:
        report.left_out.append("the rest")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        report.save()
    print("\n" + tables(report.facts, report.rows, report.left_out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
