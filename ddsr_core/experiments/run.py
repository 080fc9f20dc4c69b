"""Experiments as chains of stages: `ddsr reproduce`. What is there is not built again, so that a broken run goes on."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddsr_core.evaluation import evaluate as evaluation
from ddsr_core.experiments.design import Cell, Design, Network, Variant, as_csv, as_json, as_markdown
from ddsr_core.experiments.markdown import tables_markdown
from ddsr_core.experiments.paper_tables import WHOLE
from ddsr_core.experiments.plots import plot_metric
from ddsr_core.imaging.contact_sheet import contact_sheet
from ddsr_core.imaging.images import photo_source, read_image_set, read_rgb, save_png
from ddsr_core.pipeline.config import PipelineConfig
from ddsr_core.pipeline.fan_out import Begun, FanOut, Work
from ddsr_core.pipeline.pins import Pin, Pins
from ddsr_core.pipeline.runs import complete_run, run_folder, start_run
from ddsr_core.pipeline.stages import Build, Chain, StageRun, data_source, distill
from ddsr_core.sr import train_sr
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.plan import plan_of
from ddsr_core.storage.store import Artifact, InputRef, StageInput, Store, storage_errors, write_atomically

#: Images on a contact sheet, at most: as many as a set of the mini protocol has.
SHEET_IMAGES, SHEET_COLUMNS, SHEET_PX = 70, 10, 64
FACTS = ("psnr_bic_mean", "psnr_bic_real_mean", "max_cosine_to_train", "coverage")


@dataclass
class Experiment:
    """What an experiment has measured so far, and where it is written.

    Attributes:
        total: cells that it will have.
        stages: what has been built for it; ``pins``: their keys, until it is finished.
    """

    design: Design
    folder: Path
    about: str
    total: int
    bicubic: dict[str, float]
    stages: list[StageRun]
    pins: Pins
    cells: list[Cell] = field(default_factory=list)

    def add(self, cell: Cell) -> None:
        """Take a cell in and write tables and plots anew: what is known can be looked at while the rest is computed."""
        self.cells.append(cell)
        with storage_errors(self.folder):
            for ending, text in (("md", self.markdown()), ("csv", as_csv(self.cells)), ("json", self.json())):
                write_atomically(self.folder / f"{self.design.name}.{ending}", text.encode())
            for metric in (name for name in self.design.metrics if self.design.columns and name in self.bicubic):
                plot = plot_metric(self.cells, self.bicubic, self.design, metric)
                write_atomically(self.folder / f"{self.design.name}-{metric}.svg", plot)

    def markdown(self) -> str:
        if self.design.columns:
            return tables_markdown(self.cells, self.bicubic, self.design, self.about)
        return as_markdown(self.cells, self.bicubic, self.design.variants, self.about)

    def json(self) -> str:
        return as_json(self.cells, self.bicubic, self.about)


@dataclass(frozen=True)
class TrainingSet:
    """The images that a variant's networks are trained on, and what is known of them."""

    variant: Variant
    data: StageInput
    images: int | None
    facts: dict[str, float]


@dataclass(frozen=True)
class Pending:
    """A cell that is on its way, or not begun."""

    trained_on: TrainingSet
    network: Network
    recipe: TrainSRConfig
    inputs: dict[str, StageInput]
    label: str
    begun: Begun | None


def measure(
    design: Design, config: PipelineConfig, photos: Path, test: Path, seeds: int, store: Store, name: str, build: Build,
    log: Callable[[str], None], command: str, ahead: FanOut, device: str = "auto",
) -> Experiment:  # fmt: skip
    """Measure every training set of a design (`ddsr_core.experiments.design`) with the same networks and iterations.

    Args:
        seeds: number of seeds, 0 … seeds - 1.
        log: takes a line when a stage begins and ends, and a line a finished cell.
        command: how the table was made; stands above it.
        ahead: where networks are trained at once (`ddsr_core.pipeline.fan_out`).
        device: there.
    """
    start_run(store, name, config, photos, test)
    pins = Pins(store, name)
    chain = Chain(pins.building(build), log)
    tests = photo_source(test)
    bicubic = metrics_of(chain.add(evaluation.STAGE, config.evaluate, "bicubic", test=tests))
    folder, networks = run_folder(store, name), design.networks_of(config)
    total = len(design.variants) * len(networks) * seeds
    experiment = Experiment(design, folder, describe(design, config, seeds, command), total, bicubic, chain.stages, pins)
    waiting: deque[Pending] = deque()
    for seed in range(seeds):
        for trained_on in training_sets(chain, design, config, photos, seed):
            if seed == 0 and trained_on.variant.source not in WHOLE:
                write_sheet(trained_on.data.path, folder / f"sheet-{sheet_name(trained_on)}.png")
            for network in networks:
                waiting.append(begin(ahead, store, device, config, trained_on, network, seed, tests, pins.add))
            while waiting and is_ready(waiting[0]):
                finish_cell(experiment, chain, waiting.popleft(), config, tests, log)
    while waiting:
        finish_cell(experiment, chain, waiting.popleft(), config, tests, log)
    return experiment


def is_ready(cell: Pending) -> bool:
    """Whether a cell need not be waited for: it is done, or nobody else has begun it."""
    return cell.begun is None or cell.begun.done()


def begin(
    ahead: FanOut, store: Store, device: str, config: PipelineConfig, trained_on: TrainingSet, network: Network,
    seed: int, tests: StageInput, pin: Pin,
) -> Pending:  # fmt: skip
    """Send a cell to a worker, where there are workers."""
    recipe = network.config(config, seed)
    inputs = {"data": trained_on.data, **train_sr.trunk_input(recipe)}
    pin(train_sr.STAGE.key(recipe, inputs))
    count = "" if trained_on.variant.images is None else f" {trained_on.variant.images}"
    label = f"{network.name} {trained_on.variant.name}{count} seed {seed}"
    sources = {name: InputRef.of(item) for name, item in inputs.items()}
    work = Work(
        label=label, home=store.url, device=device, recipe=recipe, inputs=sources, evaluate=config.evaluate,
        tests=InputRef.of(tests),
    )  # fmt: skip
    return Pending(trained_on, network, recipe, inputs, label, ahead.begin(work))


def finish_cell(
    experiment: Experiment,
    chain: Chain,
    cell: Pending,
    config: PipelineConfig,
    tests: StageInput,
    log: Callable[[str], None],
) -> None:
    """Wait for a cell, or build it, and take it into the tables."""
    if cell.begun:
        cell.begun.result()  # what went wrong in a worker goes wrong here
    weights = chain.add(train_sr.STAGE, cell.recipe, cell.label, **cell.inputs)
    measured = chain.add(evaluation.STAGE, config.evaluate, cell.label, weights=weights, test=tests)
    variant, recipe = cell.trained_on.variant, cell.recipe
    facts, images = cell.trained_on.facts, cell.trained_on.images
    done = Cell(variant.name, cell.network.name, recipe.seed, metrics_of(measured), facts, images, recipe.iterations)
    experiment.add(done)
    log(f"cell {len(experiment.cells)} of {experiment.total}: {cell.label}: {done.metrics['psnr_y']:.3f} dB")


def training_sets(chain: Chain, design: Design, config: PipelineConfig, photos: Path, seed: int) -> Iterator[TrainingSet]:
    """Every training set of one seed."""
    for variant in design.distilled:
        seeded = variant.config(config, seed)
        distilled, accepted = distill(chain, seeded, photos)
        yield TrainingSet(variant, distilled, seeded.sample.count, facts_of(distilled))
    for variant in design.baselines:
        seeded = variant.config(config, seed)
        data = data_source(chain, variant.source, seeded, photos, distilled, accepted)
        images = None if variant.source in WHOLE else seeded.sample.count
        yield TrainingSet(variant, data, images, facts_of(data) if isinstance(data, Artifact) else {})


def sheet_name(trained_on: TrainingSet) -> str:
    """Of a training set's contact sheet."""
    variant = trained_on.variant
    return variant.name if variant.images is None else f"{variant.name}-{variant.images}"


def write_sheet(image_set: Path, path: Path) -> None:
    """A contact sheet of a training set; of a large one, images at equal distances."""
    rows = read_image_set(image_set)
    shown = rows[:: -(-len(rows) // SHEET_IMAGES)]
    images = [read_rgb(image_set / row["file_name"]) for row in shown]
    with storage_errors(path):
        save_png(path, contact_sheet(images, SHEET_COLUMNS, SHEET_PX))


def facts_of(artifact: Artifact) -> dict[str, float]:
    """What its stage has counted of a set's images."""
    counts = artifact.manifest.counts
    return {name: float(counts[name]) for name in FACTS if name in counts}


def metrics_of(evaluated: Artifact) -> dict[str, float]:
    """The means that were asked for."""
    return {name: value for name, value in evaluated.manifest.counts["metrics"].items() if value is not None}


def describe(design: Design, config: PipelineConfig, seeds: int, command: str) -> str:
    """The line above a table: the command and what every cell has in common."""
    networks = []
    for network in design.networks_of(config):
        recipe = network.config(config, 0)
        arch = "" if network.name == recipe.arch else f"`{recipe.arch}`, "
        networks.append(f"{network.name} ({arch}{recipe.iterations} iterations at batch {plan_of(recipe).batch_size})")
    counts = sorted({variant.images or config.sample.count for variant in design.variants if variant.source not in WHOLE})
    return (
        f"`{command}`: {', '.join(map(str, counts))} images of {config.patches.patch_px} px a set, base `{config.base}`, "
        f"{', '.join(networks)}, {seeds} seed{'s' if seeds > 1 else ''}."
    )


def finish(store: Store, name: str, experiment: Experiment) -> dict[str, Any]:
    """Mark the run completed, and return what the command prints as JSON."""
    complete_run(store, name, experiment.stages)
    experiment.pins.drop()
    return dict(json.loads(experiment.json()))
