"""Kill -9 at random points of runs on a real server: each must end Completed, with the digests of an undisturbed one.

    python -m tests.e2e.kills --count 50 --seed 0 --folder /tmp/kills

Victims: the process of the flow; the worker, whose flow goes on alone; worker and flow at once, as when a machine dies;
the server. Worker and server are started again after some seconds, as an init system would. To save time, a run counts as
silent after 75 s instead of 120, and restart-crashed runs every minute instead of every five. ``kills.jsonl`` in the folder
has a line for each kill. Exit code 1 if a run ended otherwise or with other bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.e2e.stack import FINAL, Stack, kill_quietly
from tests.helpers.commands import TINY, digests, distill, make_photos

#: Small enough for seconds, long enough for several checkpoints in every stage that keeps some.
SETTINGS = (
    "finetune.steps=30", "finetune.checkpoint_every=5", "sample.count=8", "sample.batch_size=2",
    "sr.train.iterations=60", "sr.train.checkpoint_every=10",
)  # fmt: skip
VICTIMS = {"flow": 5, "worker": 2, "server": 2, "machine": 1}
SILENCE_S = 75
RUN_LIMIT_S = 900.0


@dataclass
class Kill:
    """What was killed, when, and what became of its run."""

    run: int
    victim: str
    after_s: float
    stage: str
    outcome: str = ""


class Killer:
    """Runs on a stack, disturbed at random."""

    def __init__(self, stack: Stack, photos: Path, test: Path, seed: int) -> None:
        self.stack, self.photos, self.test = stack, photos, test
        self.random = random.Random(seed)
        self.kills: list[Kill] = []

    def disturb(self, number: int, kills: int, span_s: float) -> tuple[dict[str, str], str, float]:
        """One run with up to ``kills`` kills, each at a random moment of ``span_s`` seconds after it was seen running.

        Returns:
            its artifacts' digests, the name of its last state, and how long it took.
        """
        home = self.stack.folder / f"home-{number}"
        began = time.monotonic()
        parameters = {
            "images": str(self.photos), "test": str(self.test), "home": str(home), "device": "cpu",
            "overrides": [*TINY, *SETTINGS],
        }  # fmt: skip
        run = self.stack.begin("distill/distill", parameters)
        for _ in range(kills):
            if self.wait_running(run) in FINAL:
                break
            moment = self.random.uniform(0, span_s)
            if self.outlives(run, moment):
                self.strike(number, run, home, moment)
        last = self.stack.wait(run, "COMPLETED", "FAILED", "CANCELLED", timeout=RUN_LIMIT_S)
        for kill in self.kills:
            if kill.run == number:
                kill.outcome = last["state_name"]
        return digests(home), last["state_name"], time.monotonic() - began

    def wait_running(self, run: str) -> str:
        return str(self.stack.wait(run, "RUNNING", "COMPLETED", "FAILED", "CANCELLED", timeout=RUN_LIMIT_S)["state_type"])

    def outlives(self, run: str, seconds: float) -> bool:
        """Wait; whether the run is still there."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            time.sleep(0.2)
            if self.stack.run(run)["state_type"] in FINAL:
                return False
        return True

    def strike(self, number: int, run: str, home: Path, moment: float) -> None:
        victim = self.random.choices(list(VICTIMS), list(VICTIMS.values()))[0]
        stages = [path.parent.name for path in home.glob("artifacts/*/*.partial")]
        if victim in ("worker", "machine"):
            self.stack.kill("worker-cpu")
        if victim in ("flow", "machine"):
            hit = [kill_quietly(pid) for pid in self.stack.flow_processes()]
            if victim == "flow" and not any(hit):
                return  # it has just ended by itself
        if victim == "server":
            self.stack.kill("server")
        self.kills.append(Kill(number, victim, round(moment, 1), ", ".join(stages) or "between stages"))
        print(self.kills[-1], flush=True)
        time.sleep(self.random.uniform(0, 4))
        if victim == "server":
            self.stack.start_server()
        if victim in ("worker", "machine"):
            self.stack.start_worker("cpu")
        if victim in ("flow", "machine"):
            self.forget(run)

    def forget(self, run: str) -> None:
        """Wait until the server knows that the run is not running any more."""
        self.stack.wait(run, "CRASHED", "SCHEDULED", "PENDING", "COMPLETED", "FAILED", timeout=RUN_LIMIT_S)


def reference(folder: Path, photos: Path, test: Path) -> dict[str, str]:
    """The digests of an undisturbed run, without Prefect."""
    options = [word for text in SETTINGS for word in ("--set", text)]
    distill(photos, folder / "undisturbed", "--no-prefect", "--device", "cpu", "--test", str(test), *options)
    return digests(folder / "undisturbed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="kills in all")
    parser.add_argument("--per-run", type=int, default=4, help="kills of one run, at most")
    parser.add_argument(
        "--span", type=float, default=40.0, help="seconds after a run was seen running in which it is killed"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="new folder for homes, logs and the server's database")
    parser.add_argument("--port", type=int, default=None)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that whoever stops this stops its servers too
    sys.exit(0 if kill_often(options) else 1)


def kill_often(options: Any) -> bool:
    """Disturbed runs until there were enough kills; whether all of them ended well."""
    photos, test = make_photos(options.folder / "photos", 8), make_photos(options.folder / "test", 2, first=10)
    wanted = reference(options.folder, photos, test)
    stack = Stack(options.folder, options.port)
    good = True
    try:
        stack.start_server()
        stack.ddsr("deploy", "--silence", str(SILENCE_S))
        stack.restart_every_minute()
        stack.start_worker("cpu")
        killer = Killer(stack, photos, test, options.seed)
        number = 0
        while len(killer.kills) < options.count:
            number += 1
            allowed = min(options.per_run, options.count - len(killer.kills))
            found, state, seconds = killer.disturb(number, allowed, options.span)
            same = found == wanted
            good = good and same and state == "Completed"
            line = f"run {number}: {state} after {seconds:.0f} s, {'same' if same else 'OTHER'} digests"
            print(f"{line}, {len(killer.kills)} kills so far", flush=True)
            log(options.folder / "kills.jsonl", [kill for kill in killer.kills if kill.run == number], same)
    finally:
        stack.stop()
    counts = {victim: sum(kill.victim == victim for kill in killer.kills) for victim in VICTIMS}
    print(f"{len(killer.kills)} kills {counts} in {number} runs: {'all well' if good else 'NOT all well'}")
    return good


def log(path: Path, kills: list[Kill], same: bool) -> None:
    with path.open("a") as file:
        for kill in kills:
            file.write(json.dumps({**asdict(kill), "same_digests": same}) + "\n")


if __name__ == "__main__":
    main()
