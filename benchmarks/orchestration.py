"""The cost of Prefect: the demo with and without it, the demo again from the cache, and many mapped tasks.

    python -m benchmarks.orchestration [--full] [--repeats 3] [--tasks 200] [--only overhead cached mapped]

Overhead: the command `ddsr demo` without Prefect, with Prefect's temporary server, and against a running server. The demo
is shortened (`SHORT`) unless --full is given. The time that a command spends outside its stages is the cost of startup and
orchestration; the time of the stages themselves, which varies with the load, drops out. Cached: the same commands again.
CPU seconds include the temporary server if the command starts one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from benchmarks.servers import postgres_folder, postgres_server, prefect_server

ROOT = Path(__file__).resolve().parents[1]
#: All stages and networks of the demo, with fewer steps.
SHORT = ("finetune.steps=60", "sample.count=28", "sr.train.iterations=60")
WAYS = ("without Prefect", "temporary server", "running server")


@dataclass(frozen=True)
class Command:
    """One `ddsr demo`.

    Attributes:
        wall: seconds from start to end; ``cpu``: of all its processes.
        stages: seconds spent building stages.
        cached: number of stages from the cache; ``count``: of all stages.
    """

    wall: float
    cpu: float
    stages: float
    cached: int
    count: int

    @property
    def outside(self) -> float:
        """Seconds spent on anything but building stages."""
        return self.wall - self.stages


@contextmanager
def environment_of(way: str, folder: Path) -> Iterator[tuple[dict[str, str], tuple[str, ...]]]:
    """Environment variables and options for one way to run the command."""
    unset = ("PREFECT_API_URL", "DDSR_HOME")
    clean = {name: value for name, value in os.environ.items() if name not in unset}
    clean = {**clean, "PREFECT_HOME": str(folder / "prefect"), "PYTHONPATH": str(ROOT)}
    with prefect_server(folder / "server") if way == "running server" else nullcontext() as server:
        address = {"PREFECT_API_URL": server.url} if server else {}
        yield {**clean, **address}, ("--no-prefect" if way == "without Prefect" else "--prefect",)


def run_demo(home: Path, overrides: tuple[str, ...], environment: dict[str, str], options: tuple[str, ...]) -> Command:
    """Run the command and measure it."""
    command = [sys.executable, "-m", "flows.cli.main", "demo", "--home", str(home), "--json", *options]
    command += [word for text in overrides for word in ("--set", text)]
    before, started = os.times(), time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    wall, after = time.monotonic() - started, os.times()
    if done.returncode != 0:
        raise RuntimeError(f"the command failed: {done.stderr[-2000:]}")
    stages = json.loads(done.stdout)["stages"]
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    built = sum(row["seconds"] for row in stages if not row["cached"])
    return Command(wall, cpu, built, sum(row["cached"] for row in stages), len(stages))


def demos(
    ways: list[str], overrides: tuple[str, ...], repeats: int, cold: bool
) -> dict[str, tuple[Command | None, list[Command]]]:
    """For each way: the first run, in a home of its own if ``cold``, and the runs from the cache."""
    runs: dict[str, tuple[Command | None, list[Command]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        shared = Path(temporary) / "home"
        for way in ways:
            folder = Path(temporary) / way.replace(" ", "-")
            home = folder / "home" if cold else shared
            with environment_of(way, folder) as (environment, options):
                first = run_demo(home, overrides, environment, options)
                again = [run_demo(home, overrides, environment, options) for _ in range(repeats)]
            runs[way] = (first if cold else None, again)
    return runs


def overhead_table(firsts: dict[str, Command]) -> str:
    """The cost of each way relative to the command without Prefect, which comes first."""
    plain = firsts["without Prefect"]
    lines = ["| | wall, s | in stages, s | outside stages, s | CPU, s | overhead, s | overhead relative to no Prefect |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for way, run in firsts.items():
        extra = run.outside - plain.outside
        cells = (
            f"{run.wall:.1f} | {run.stages:.1f} | {run.outside:.1f} | {run.cpu:.1f} | {extra:.1f} | {extra / plain.wall:.1%}"
        )
        lines.append(f"| {way} | {cells} |")
    return "\n".join(lines)


def cached_table(again: dict[str, list[Command]]) -> str:
    """Medians of the runs in which every stage came from the cache."""
    lines = ["| | cached stages | wall, s | CPU, s | wall relative to no Prefect |", "|---|---|---|---|---|"]
    plain = statistics.median(run.wall for run in again["without Prefect"])
    for way, runs in again.items():
        wall, cpu = (statistics.median(getattr(run, field) for run in runs) for field in ("wall", "cpu"))
        stages = f"{runs[0].cached} of {runs[0].count}"
        lines.append(f"| {way} | {stages} | {wall:.1f} | {cpu:.1f} | {wall / plain:.2f} |")
    return "\n".join(lines)


def mapped_table(count: int) -> str:
    """Tasks that do nothing, on a server with each database."""
    lines = ["| database | tasks | recorded as completed | s | tasks/s | database errors | time relative to SQLite |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    first: float | None = None
    for name in ("SQLite", "PostgreSQL"):
        if name == "PostgreSQL" and postgres_folder() is None:
            lines.append("| PostgreSQL | - | not installed here | - | - | - | - |")
            continue
        with (
            tempfile.TemporaryDirectory() as folder,
            postgres_server() if name == "PostgreSQL" else nullcontext() as database,
            prefect_server(Path(folder), database) as server,
        ):
            environment = {**os.environ, "PREFECT_HOME": folder, "PREFECT_API_URL": server.url, "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-m", "benchmarks.many_tasks", str(count)]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
            seconds, _, states = done.stdout.strip().splitlines()[-1].partition(" ")
            took = float(seconds)
            first = first or took
            completed = json.loads(states.replace("'", '"')).get("COMPLETED", 0)
            cells = (
                f"{count} | {completed} | {took:.1f} | {count / took:.1f} | {server.database_errors()} | {took / first:.2f}"
            )
            lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="run the demo without shortening it")
    parser.add_argument("--set", dest="overrides", action="append", help="replaces SHORT; may be repeated")
    parser.add_argument("--repeats", type=int, default=3, help="runs from the cache")
    parser.add_argument("--tasks", type=int, default=200, help="number of mapped tasks")
    parser.add_argument("--ways", nargs="+", choices=WAYS[1:], default=list(WAYS[1:]), help="compared with no Prefect")
    parser.add_argument(
        "--only", nargs="+", choices=["overhead", "cached", "mapped"], default=["overhead", "cached", "mapped"]
    )
    given = parser.parse_args(arguments)
    overrides = () if given.full else tuple(given.overrides or SHORT)
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load before {load:.1f}; ddsr demo {' '.join(f'--set {text}' for text in overrides)}\n")
    if {"overhead", "cached"} & set(given.only):
        runs = demos(
            [WAYS[0], *given.ways], overrides, given.repeats if "cached" in given.only else 0, cold="overhead" in given.only
        )
        if "overhead" in given.only:
            print(overhead_table({way: first for way, (first, _) in runs.items() if first}), flush=True)
        if "cached" in given.only:
            print("\n" + cached_table({way: again for way, (_, again) in runs.items()}), flush=True)
    if "mapped" in given.only:
        print("\n" + mapped_table(given.tasks))
    print(f"\nload after {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
