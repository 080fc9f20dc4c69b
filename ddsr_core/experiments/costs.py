"""What the training sets and networks of an experiment cost: seconds and CPU seconds of the builds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from ddsr_core.experiments.design import Cell, markdown_row
from ddsr_core.pipeline.stages import StageRun
from ddsr_core.sr import train_sr
from ddsr_core.storage.stage import Artifact

#: Stage -> the part of a set's cost that it belongs to. SR networks that take part in making a set count as ``teacher``.
_PART_OF_STAGE: Mapping[str, str] = {
    "finetune": "finetune", "sample": "images", "crops": "images", "restore": "images", "subset": "images", "gsdd": "images",
    train_sr.STAGE.name: "teacher",
}  # fmt: skip
#: Parts of the cost of a set, in the order of the table, and their headings.
SET_PARTS: Mapping[str, str] = {
    "finetune": "fine-tuning", "images": "making the images", "teacher": "training the teacher or generator",
}  # fmt: skip
#: The cost of the network itself.
TRAINING = "training"


class CostTable(NamedTuple):
    """One table: what its rows are, the cells of its head, and its rows."""

    heading: str
    header: list[str]
    rows: list[list[str]]


def costs_of_set(runs: Iterable[StageRun]) -> dict[str, float]:
    """Seconds of the parts that made a training set, ``finetune_s``, and of CPU, ``finetune_cpu_s``, where recorded.

    An artifact counts once. Builds count with the time that they took, whenever that was.
    """
    artifacts = {run.artifact.key: run.artifact.manifest for run in runs}
    costs: dict[str, float] = {}
    for manifest in artifacts.values():
        part = _PART_OF_STAGE.get(manifest.stage)
        if part:
            _add(costs, part, manifest.seconds, manifest.cpu_seconds)
    return costs


def cost_of_training(network: Artifact) -> dict[str, float]:
    """Seconds of the training of an SR network, ``training_s`` and ``training_cpu_s``."""
    costs: dict[str, float] = {}
    _add(costs, TRAINING, network.manifest.seconds, network.manifest.cpu_seconds)
    return costs


def _add(costs: dict[str, float], part: str, seconds: float, cpu: float | None) -> None:
    for name, value in ((f"{part}_s", seconds), (f"{part}_cpu_s", cpu)):
        if value is not None:
            costs[name] = costs.get(name, 0.0) + value


def cost_tables(cells: Sequence[Cell]) -> list[CostTable]:
    """The cost of each training set and of each network, as means over seeds; none if no cost is known."""
    if not any(cell.costs for cell in cells):
        return []
    by_set: dict[tuple[str, int | None], list[Cell]] = {}
    by_network: dict[tuple[str, int | None], list[Cell]] = {}
    for cell in cells:
        by_set.setdefault((cell.variant, cell.images), []).append(cell)
        by_network.setdefault((cell.network, cell.iterations), []).append(cell)
    sets = [[name, _count(images), *(_text(own, part) for part in SET_PARTS)] for (name, images), own in by_set.items()]
    networks = [[name, _count(iterations), _text(own, TRAINING)] for (name, iterations), own in by_network.items()]
    return [
        CostTable("Cost of the training sets", ["training set", "images", *SET_PARTS.values()], sets),
        CostTable("Cost of the networks", ["network", "iterations", "training"], networks),
    ]


def costs_markdown(cells: Sequence[Cell]) -> list[str]:
    """Lines of the cost tables."""
    lines: list[str] = []
    for table in cost_tables(cells):
        rows = [table.header, ["---"] * len(table.header), *table.rows]
        lines += [f"## {table.heading}", "", *map(markdown_row, rows), ""]
    return [*lines, COSTS_NOTE, ""] if lines else []


COSTS_NOTE = "Seconds from start to end, and in brackets seconds of CPU; means over seeds. Sets may share a part."


def _count(value: int | None) -> str:
    return "all" if value is None else f"{value:,}"


def _text(cells: Sequence[Cell], part: str) -> str:
    """Such as ``61 (118)``; empty if the set has no such part."""
    seconds = [cell.costs[f"{part}_s"] for cell in cells if f"{part}_s" in cell.costs]
    cpu = [cell.costs[f"{part}_cpu_s"] for cell in cells if f"{part}_cpu_s" in cell.costs]
    if not seconds:
        return ""
    return f"{fmean(seconds):,.1f}" + (f" ({fmean(cpu):,.1f})" if cpu else "")
