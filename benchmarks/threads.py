"""A training step of a small SR network by how its threads wait: on the machine as it is, and beside a busy process.

    python -m benchmarks.threads [--network srformer-small] [--steps 40] [--busy 1] [--no-idle]

Every setting in a process of its own, in turns, as it has to be set before torch is imported. Median milliseconds of wall
time per step. `default` is what libgomp does by itself; the others are relative to it, below 1 is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Name -> environment. ``ddsr`` is what importing ddsr_core sets.
SETTINGS = {
    "default": {"GOMP_SPINCOUNT": None, "DDSR_BENCHMARK_SPIN": "keep"},
    "ddsr": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
CLEARED = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
WARM_UP = 3


def time_steps(network: str, steps: int) -> list[float]:
    """Seconds of each step, in this process."""
    if os.environ.get("DDSR_BENCHMARK_SPIN") == "keep":
        import torch  # before ddsr_core sets anything  # noqa: F401
    import torch.nn.functional as F
    from torch import rand

    from ddsr_core.sr.config import TrainSRConfig
    from ddsr_core.sr.state import new_state
    from ddsr_core.sr.train_sr import train_step

    config = TrainSRConfig(arch=network, iterations=steps + WARM_UP, batch_size=16, lr_patch_px=16)
    state = new_state(config, "cpu")
    lr = rand(16, 3, 16, 16)
    hr = F.interpolate(lr, scale_factor=4)
    seconds = []
    for _ in range(steps + WARM_UP):
        begun = time.perf_counter()
        train_step(config, state, lr, hr, bf16=False)
        seconds.append(time.perf_counter() - begun)
        state.step += 1
    return seconds[WARM_UP:]


def measure(network: str, steps: int, setting: str) -> float:
    """Median milliseconds of a step, in a process with that setting."""
    environment = {name: value for name, value in os.environ.items() if name not in CLEARED}
    environment |= {name: value for name, value in SETTINGS[setting].items() if value is not None}
    command = [sys.executable, "-m", "benchmarks.threads", "--child", "--network", network, "--steps", str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return statistics.median(json.loads(done.stdout)) * 1e3


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """That many processes that each keep a core busy."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown: one row per setting."""
    columns = list(next(iter(rows.values())))
    lines = [
        "| setting | " + " | ".join(f"{name}, ms | ratio" for name in columns) + " |",
        "|" + "---|" * (1 + 2 * len(columns)),
    ]
    for setting, values in rows.items():
        cells = (f"{values[name]:.1f} | {values[name] / rows['default'][name]:.2f}" for name in columns)
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="srformer-small")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--busy", type=int, default=1, help="processes that keep a core busy each")
    parser.add_argument("--no-idle", action="store_true", help="leave out the machine as it is, where it is not idle")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(time_steps(options.network, options.steps)))
        return
    rows: dict[str, dict[str, float]] = {setting: {} for setting in SETTINGS}
    columns = {} if options.no_idle else {"as it is": 0}
    columns[f"beside {options.busy} busy"] = options.busy
    for name, processes in columns.items():
        with busy(processes):
            for setting in SETTINGS:
                rows[setting][name] = measure(options.network, options.steps, setting)
    load = os.getloadavg()[0]
    print(f"{options.network}, {os.cpu_count()} cores, load {load:.1f} at the end\n\n{table(rows)}")


if __name__ == "__main__":
    main()
