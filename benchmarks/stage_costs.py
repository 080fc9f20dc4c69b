"""Counts what the stages of the presets cost per item, and writes it to ddsr_core/planning/costs.json.

    python -m benchmarks.stage_costs

Estimates before a run read this file (`ddsr_core.planning.quick`). Run this again when a preset or the code of a stage
changes; tests/unit/planning/test_quick.py compares the file with a full plan. It takes some minutes of one core, and no
weights.
"""

from __future__ import annotations

from collections import Counter
from typing import get_args

from ddsr_core.config import StageConfig
from ddsr_core.pipeline.config import Preset, load_config
from ddsr_core.planning.config import load_machine
from ddsr_core.planning.estimate import Recorder, walk
from ddsr_core.planning.quick import ARITHMETIC, COSTS, cost_key, cost_of
from ddsr_core.planning.work import Context, Inputs, Output, Work, work_of
from ddsr_core.storage.files import write_json

#: Photos that stand for those of users: height and width in pixels, and how many there are.
PHOTOS, TESTS = Counter({(960, 1280): 300}), Counter({(320, 480): 20})
#: Machines with the two kinds of devices; the number formats and the checkpointing depend on it.
MACHINES = ("cpu", "h100")


def main() -> None:
    """Count and write."""
    costs = {}
    for preset in get_args(Preset):
        for machine in MACHINES:

            def counted(stage: str, config: StageConfig, inputs: Inputs, context: Context) -> tuple[Work, Output]:
                key = cost_key(stage, config, inputs, context)
                cost = None if stage in ARITHMETIC else cost_of(stage, config, inputs, context)
                if cost is not None:
                    costs.setdefault(key, cost)
                return work_of(stage, config, inputs, context)

            context = Context(load_config(preset), load_machine(machine), 0.5)
            recorder = Recorder(context, {"photos": Output(PHOTOS), "tests": Output(TESTS)}, work_of=counted)
            walk(context.config, recorder)
            print(f"{preset} on {machine}: {len(costs)} costs", flush=True)
    write_json(COSTS, dict(sorted(costs.items())))


if __name__ == "__main__":
    main()
