"""Experiments as chains of stages: `ddsr reproduce`. What is there is not built again, so that a broken run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddsr_core import evaluation
from ddsr_core.experiments import ABLATION, BASELINES, Cell, as_csv, as_markdown
from ddsr_core.images import photo_source
from ddsr_core.pipeline import PipelineConfig
from ddsr_core.sr import train
from ddsr_core.store import Artifact, StageInput, Store, storage_errors, write_atomically
from flows.chain import Build, Chain, data_source, distill
from flows.runs import run_folder, start_run

FACTS = ("psnr_bic_mean", "psnr_bic_real_mean", "max_cosine_to_train", "coverage")


@dataclass
class Experiment:
    """What an experiment has measured so far, and where it is written.

    Attributes:
        total: cells that it will have.
    """

    folder: Path
    about: str
    total: int
    bicubic: dict[str, float]
    cells: list[Cell] = field(default_factory=list)

    def add(self, cell: Cell) -> None:
        """Take a cell in and write the tables anew: what is known can be looked at while the rest is computed."""
        self.cells.append(cell)
        with storage_errors(self.folder):
            write_atomically(self.folder / "ablation.md", self.markdown().encode())
            write_atomically(self.folder / "ablation.csv", as_csv(self.cells).encode())

    def markdown(self) -> str:
        return as_markdown(self.cells, self.bicubic, (*ABLATION, *BASELINES), self.about)


def ablation(
    config: PipelineConfig, photos: Path, test: Path, seeds: int, store: Store, name: str, build: Build,
    log: Callable[[str], None], command: str,
) -> Experiment:  # fmt: skip
    """Measure every part of the method at equal image budget and equal iterations (`ddsr_core.experiments.ABLATION`).

    Args:
        seeds: number of seeds, 0 … seeds - 1.
        log: takes a line when a stage begins and ends, and a line a finished cell.
        command: how the table was made; stands above it.
    """
    start_run(store, name, config, photos, test)
    chain = Chain(build, log)
    tests = photo_source(test)
    bicubic = metrics_of(chain.add(evaluation.STAGE, config.evaluate, "bicubic", test=tests))
    sets, archs = (*ABLATION, *BASELINES), config.sr.archs
    experiment = Experiment(
        run_folder(store, name), describe(config, seeds, command), len(sets) * len(archs) * seeds, bicubic
    )
    for seed in range(seeds):
        for variant, data, facts in training_sets(chain, config, photos, seed):
            for arch in archs:
                label = f"{arch} {variant} seed {seed}"
                weights = chain.add(train.STAGE, config.sr.recipe(arch, seed), label, data=data)
                measured = chain.add(evaluation.STAGE, config.evaluate, label, weights=weights, test=tests)
                cell = Cell(variant, arch, seed, metrics_of(measured), facts)
                experiment.add(cell)
                log(f"cell {len(experiment.cells)} of {experiment.total}: {label}: {cell.metrics['psnr_y']:.3f} dB")
    return experiment


def training_sets(
    chain: Chain, config: PipelineConfig, photos: Path, seed: int
) -> Iterator[tuple[str, StageInput, dict[str, float]]]:
    """Every training set of one seed: the name of its variant, itself, and what is known of its images."""
    seeded = config.model_copy(update={"sr": config.sr.model_copy(update={"seeds": (seed,)})})
    for variant in ABLATION:
        distilled, accepted = distill(chain, variant.config(config, seed), photos)
        yield variant.name, distilled, facts_of(distilled)
    for baseline in BASELINES:
        data = data_source(chain, baseline.name, seeded, photos, distilled, accepted)
        yield baseline.name, data, facts_of(data) if isinstance(data, Artifact) else {}


def facts_of(artifact: Artifact) -> dict[str, float]:
    """What its stage has counted of a set's images."""
    counts = artifact.manifest.counts
    return {name: float(counts[name]) for name in FACTS if name in counts}


def metrics_of(evaluated: Artifact) -> dict[str, float]:
    """The means that were asked for."""
    return {name: value for name, value in evaluated.manifest.counts["metrics"].items() if value is not None}


def describe(config: PipelineConfig, seeds: int, command: str) -> str:
    """The line above a table: the command and what every cell has in common."""
    recipe = config.sr.recipe(config.sr.archs[0], 0)
    return (
        f"`{command}`: {config.sample.count} images of {config.patches.patch_px} px a set, base `{config.base}`, "
        f"{recipe.iterations} iterations at batch {recipe.batch_size}, {seeds} seed{'s' if seeds > 1 else ''}."
    )


def finish(store: Store, name: str, experiment: Experiment) -> dict[str, Any]:
    """Write ``ablation.json``, mark the run completed, and return what the command prints as JSON."""
    folder = run_folder(store, name)
    facts = {
        "about": experiment.about,
        "bicubic": dict(experiment.bicubic),
        "cells": [
            {"variant": c.variant, "arch": c.arch, "seed": c.seed, "metrics": dict(c.metrics), "facts": dict(c.facts)}
            for c in experiment.cells
        ],
    }
    with storage_errors(folder):
        write_atomically(folder / "ablation.json", (json.dumps(facts, indent=2) + "\n").encode())
        state = json.loads((folder / "run.json").read_text())
        write_atomically(folder / "run.json", (json.dumps({**state, "status": "completed"}, indent=2) + "\n").encode())
    return facts
