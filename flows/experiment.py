"""Experiments as chains of stages: `ddsr reproduce`. What is there is not built again, so that a broken run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddsr_core import evaluation
from ddsr_core.experiments import Cell, Design, as_csv, as_json, as_markdown
from ddsr_core.images import photo_source, read_image_set, read_rgb, save_png
from ddsr_core.pipeline import PipelineConfig
from ddsr_core.sheets import contact_sheet
from ddsr_core.sr import train
from ddsr_core.store import Artifact, StageInput, Store, storage_errors, write_atomically, write_json
from flows.chain import Build, Chain, data_source, distill
from flows.runs import run_folder, start_run

#: Images on a contact sheet, at most: as many as a set of the mini protocol has.
SHEET_IMAGES, SHEET_COLUMNS, SHEET_PX = 70, 10, 64
FACTS = ("psnr_bic_mean", "psnr_bic_real_mean", "max_cosine_to_train", "coverage")


@dataclass
class Experiment:
    """What an experiment has measured so far, and where it is written.

    Attributes:
        total: cells that it will have.
    """

    design: Design
    folder: Path
    about: str
    total: int
    bicubic: dict[str, float]
    cells: list[Cell] = field(default_factory=list)

    def add(self, cell: Cell) -> None:
        """Take a cell in and write the tables anew: what is known can be looked at while the rest is computed."""
        self.cells.append(cell)
        with storage_errors(self.folder):
            for ending, text in (("md", self.markdown()), ("csv", as_csv(self.cells)), ("json", self.json())):
                write_atomically(self.folder / f"{self.design.name}.{ending}", text.encode())

    def markdown(self) -> str:
        return as_markdown(self.cells, self.bicubic, self.design.variants, self.about)

    def json(self) -> str:
        return as_json(self.cells, self.bicubic, self.about)


def measure(
    design: Design, config: PipelineConfig, photos: Path, test: Path, seeds: int, store: Store, name: str, build: Build,
    log: Callable[[str], None], command: str,
) -> Experiment:  # fmt: skip
    """Measure every training set of a design (`ddsr_core.experiments`) with the same networks and iterations.

    Args:
        seeds: number of seeds, 0 … seeds - 1.
        log: takes a line when a stage begins and ends, and a line a finished cell.
        command: how the table was made; stands above it.
    """
    start_run(store, name, config, photos, test)
    chain = Chain(build, log)
    tests = photo_source(test)
    bicubic = metrics_of(chain.add(evaluation.STAGE, config.evaluate, "bicubic", test=tests))
    folder, archs = run_folder(store, name), config.sr.archs
    total = len(design.variants) * len(archs) * seeds
    experiment = Experiment(design, folder, describe(config, seeds, command), total, bicubic)
    for seed in range(seeds):
        for variant, data, facts in training_sets(chain, design, config, photos, seed):
            if seed == 0 and isinstance(data, Artifact):
                write_sheet(data, folder / f"sheet-{variant}.png")
            for arch in archs:
                label = f"{arch} {variant} seed {seed}"
                weights = chain.add(train.STAGE, config.sr.recipe(arch, seed), label, data=data)
                measured = chain.add(evaluation.STAGE, config.evaluate, label, weights=weights, test=tests)
                cell = Cell(variant, arch, seed, metrics_of(measured), facts)
                experiment.add(cell)
                log(f"cell {len(experiment.cells)} of {experiment.total}: {label}: {cell.metrics['psnr_y']:.3f} dB")
    return experiment


def training_sets(
    chain: Chain, design: Design, config: PipelineConfig, photos: Path, seed: int
) -> Iterator[tuple[str, StageInput, dict[str, float]]]:
    """Every training set of one seed: the name of its variant, itself, and what is known of its images."""
    for variant in design.distilled:
        distilled, accepted = distill(chain, variant.config(config, seed), photos)
        yield variant.name, distilled, facts_of(distilled)
    for baseline in design.baselines:
        data = data_source(chain, baseline.source, baseline.config(config, seed), photos, distilled, accepted)
        yield baseline.name, data, facts_of(data) if isinstance(data, Artifact) else {}


def write_sheet(image_set: Artifact, path: Path) -> None:
    """A contact sheet of a training set; of a large one, images at equal distances."""
    rows = read_image_set(image_set.path)
    shown = rows[:: -(-len(rows) // SHEET_IMAGES)]
    images = [read_rgb(image_set.path / row["file_name"]) for row in shown]
    with storage_errors(path):
        save_png(path, contact_sheet(images, SHEET_COLUMNS, SHEET_PX))


def facts_of(artifact: Artifact) -> dict[str, float]:
    """What its stage has counted of a set's images."""
    counts = artifact.manifest.counts
    return {name: float(counts[name]) for name in FACTS if name in counts}


def metrics_of(evaluated: Artifact) -> dict[str, float]:
    """The means that were asked for."""
    return {name: value for name, value in evaluated.manifest.counts["metrics"].items() if value is not None}


def describe(config: PipelineConfig, seeds: int, command: str) -> str:
    """The line above a table: the command and what every cell has in common."""
    recipes = [config.sr.recipe(arch, 0) for arch in config.sr.archs]
    networks = ", ".join(f"{r.arch} ({r.iterations} iterations at batch {r.batch_size})" for r in recipes)
    return (
        f"`{command}`: {config.sample.count} images of {config.patches.patch_px} px a set, base `{config.base}`, "
        f"{networks}, {seeds} seed{'s' if seeds > 1 else ''}."
    )


def finish(store: Store, name: str, experiment: Experiment) -> dict[str, Any]:
    """Mark the run completed, and return what the command prints as JSON."""
    folder = run_folder(store, name)
    with storage_errors(folder):
        state = json.loads((folder / "run.json").read_text())
        write_json(folder / "run.json", {**state, "status": "completed"})
    return dict(json.loads(experiment.json()))
