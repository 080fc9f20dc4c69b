"""Experiments as sequences of stages: `ddsr reproduce`. An interrupted experiment resumes from the cached stages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddsr_core.baselines.names import WHOLE
from ddsr_core.experiments.costs import cost_of_training, costs_markdown, costs_of_set
from ddsr_core.experiments.design import Cell, Design, Network, Variant, as_csv, as_json, as_markdown
from ddsr_core.experiments.markdown import tables_markdown
from ddsr_core.experiments.page import experiment_page
from ddsr_core.experiments.plots import plot_metric
from ddsr_core.imaging.contact_sheet import contact_sheet
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.hold_out import left_out_text
from ddsr_core.imaging.image_sets import read_image_set
from ddsr_core.imaging.images import save_png
from ddsr_core.pipeline.config import PipelineConfig
from ddsr_core.pipeline.distill import distill, training_set
from ddsr_core.pipeline.networks import NetworkJob, network_job, network_of, prefetched
from ddsr_core.pipeline.run import Run
from ddsr_core.pipeline.run_folder import run_folder
from ddsr_core.pipeline.run_state import complete_run
from ddsr_core.pipeline.stages import Stages
from ddsr_core.sr.plan import plan_of
from ddsr_core.storage.files import storage_errors, write_atomically
from ddsr_core.storage.stage import Artifact, Source, StageInput

#: Images on a contact sheet, at most: as many as a set of the mini protocol has.
SHEET_IMAGES, SHEET_COLUMNS, SHEET_PX = 70, 10, 64
STATISTICS = (
    "psnr_bic_mean", "psnr_bic_real_mean", "max_cosine_to_train", "coverage", "own_cluster_share", "precision", "recall",
    "psnr_bic_distance_db",
)  # fmt: skip


@dataclass
class Experiment:
    """What an experiment has measured so far.

    Attributes:
        folder: that its tables and plots are written to.
        about: how the tables were made.
        total: number of cells that it will have.
        bicubic: metrics of bicubic upscaling.
    """

    design: Design
    folder: Path
    about: str
    total: int
    bicubic: dict[str, float]
    cells: list[Cell] = field(default_factory=list)

    def add(self, cell: Cell) -> None:
        """Add a cell and write tables and plots again, so that they can be read while the rest is computed."""
        self.cells.append(cell)
        with storage_errors(self.folder):
            for ending, text in (("md", self.markdown()), ("csv", as_csv(self.cells)), ("json", self.json())):
                write_atomically(self.folder / f"{self.design.name}.{ending}", text.encode())
            page = experiment_page(self.cells, self.bicubic, self.design, self.about, self.total, self.folder)
            write_atomically(self.folder / "report.html", page.encode())
            for metric in (name for name in self.design.metrics if self.design.columns and name in self.bicubic):
                plot = plot_metric(self.cells, self.bicubic, self.design, metric)
                write_atomically(self.folder / f"{self.design.name}-{metric}.svg", plot)

    def markdown(self) -> str:
        write = tables_markdown if self.design.columns else as_markdown
        text = write(self.cells, self.bicubic, self.design, self.about)
        return "\n".join([text, *costs_markdown(self.cells)]).rstrip() + "\n"

    def json(self) -> str:
        return as_json(self.cells, self.bicubic, self.about)


@dataclass(frozen=True)
class TrainingSet:
    """The images that the networks of a variant are trained on, their statistics, and what they cost."""

    variant: Variant
    data: StageInput
    images: int | None
    statistics: dict[str, float]
    costs: dict[str, float]


def measure(design: Design, run: Run, seeds: int, command: str) -> Experiment:
    """Measure every training set of a design (`ddsr_core.experiments.design`) with the same networks and iterations.

    Args:
        run: with test photos; the variants change its config.
        seeds: number of seeds, counted from 0.
        command: command that started the experiment; printed above its tables.
    """
    stages, tests = run.stages, run.test_photos
    config, folder = stages.config, run_folder(run.store, run.name)
    bicubic = metrics_of(stages.evaluate(tests))
    total = len(design.variants) * len(design.networks_of(config)) * seeds
    experiment = Experiment(design, folder, describe(design, config, seeds, command, run.left_out), total, bicubic)
    for job, (trained_on, network) in prefetched(stages, jobs_of(design, run, tests, seeds)):
        trained, measured = network_of(stages, job, trained_on.data, tests)
        done = Cell(
            trained_on.variant.name, network.name, job.recipe.seed, metrics_of(measured), trained_on.statistics,
            trained_on.images, job.recipe.iterations, {**trained_on.costs, **cost_of_training(trained)},
        )  # fmt: skip
        experiment.add(done)
        stages.log(f"cell {len(experiment.cells)} of {total}: {job.label}: {done.metrics['psnr_y']:.3f} dB")
    return experiment


def jobs_of(design: Design, run: Run, tests: Source, seeds: int) -> Iterator[tuple[NetworkJob, tuple[TrainingSet, Network]]]:
    """The networks of an experiment, seed by seed. A training set is made when its first network is due."""
    config = run.stages.config
    for seed in range(seeds):
        for trained_on in training_sets(run.stages, design, run.photos, seed):
            if seed == 0 and trained_on.variant.source not in WHOLE:
                write_sheet(trained_on.data.path, run_folder(run.store, run.name) / f"sheet-{sheet_name(trained_on)}.png")
            count = "" if trained_on.variant.images is None else f" {trained_on.variant.images}"
            for network in design.networks_of(config):
                label = f"{network.name} {trained_on.variant.name}{count} seed {seed}"
                recipe = network.config(config, seed)
                yield network_job(run.stages, recipe, trained_on.data, tests, label), (trained_on, network)


def training_sets(stages: Stages, design: Design, photos: Source, seed: int) -> Iterator[TrainingSet]:
    """Every training set of one seed."""
    for variant in design.distilled:
        seeded = variant.config(stages.config, seed)
        before = len(stages.runs)
        distilled = distill(stages.with_config(seeded), photos)
        costs = costs_of_set(stages.runs[before:])
        yield TrainingSet(variant, distilled.images, seeded.sample.count, statistics_of(distilled.images), costs)
    for variant in design.baselines:
        seeded = variant.config(stages.config, seed)
        before = len(stages.runs)
        data = training_set(stages.with_config(seeded), variant.source, distilled)
        costs = costs_of_set(stages.runs[before:])
        images = None if variant.source in WHOLE else seeded.sample.count
        yield TrainingSet(variant, data, images, statistics_of(data) if isinstance(data, Artifact) else {}, costs)


def sheet_name(trained_on: TrainingSet) -> str:
    """Name of the contact sheet of a training set."""
    variant = trained_on.variant
    name = variant.name.replace(" + ", "-")
    return name if variant.images is None else f"{name}-{variant.images}"


def write_sheet(image_set: Path, path: Path) -> None:
    """Write a contact sheet of a training set; of a large set, every n-th image."""
    rows = read_image_set(image_set)
    shown = rows[:: -(-len(rows) // SHEET_IMAGES)]
    images = [read_rgb(image_set / row["file_name"]) for row in shown]
    with storage_errors(path):
        save_png(path, contact_sheet(images, SHEET_COLUMNS, SHEET_PX))


def statistics_of(artifact: Artifact) -> dict[str, float]:
    """What the stage has computed about the images of a set."""
    counts = artifact.manifest.counts
    return {name: float(counts[name]) for name in STATISTICS if name in counts}


def metrics_of(evaluated: Artifact) -> dict[str, float]:
    """The metrics that were measured, as means over the test photos."""
    return {name: value for name, value in evaluated.manifest.counts["metrics"].items() if value is not None}


def describe(design: Design, config: PipelineConfig, seeds: int, command: str, left_out: int = 0) -> str:
    """The line above a table: the command, and what all cells have in common."""
    networks = []
    for network in design.networks_of(config):
        recipe = network.config(config, 0)
        arch = "" if network.name == recipe.arch else f"`{recipe.arch}`, "
        networks.append(f"{network.name} ({arch}{recipe.iterations} iterations at batch {plan_of(recipe).batch_size})")
    counts = sorted({variant.images or config.sample.count for variant in design.variants if variant.source not in WHOLE})
    return (
        f"`{command}`: {', '.join(map(str, counts))} images of {config.patches.patch_px} px per set, base `{config.base}`, "
        f"{', '.join(networks)}, {seeds} seed{'s' if seeds > 1 else ''}.{f' {left_out_text(left_out)}.' if left_out else ''}"
    )


def finish(run: Run, experiment: Experiment) -> dict[str, Any]:
    """Mark the run completed, and return what the command prints as JSON."""
    complete_run(run.store, run.name, run.stages.runs)
    run.pins.drop()
    return dict(json.loads(experiment.json()))
