"""Experiments on the method: variants of one config, each with several seeds, and the tables that compare them.

A variant changes a few fields and nothing else, so all variants share the stages before the change. Within a column every
training set has the same number of images (except the full data), and each network is trained on each of them by the same
recipe for the same number of iterations. A seed fixes the fine-tuning noise, sampling noise, crops and SR initialization of
every variant, so differences are taken seed by seed.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ddsr_core.baselines.names import RESTORED_CROPS, RESTORED_MEANING, TRAINING_SETS, TrainingSetName
from ddsr_core.metrics.spec import METRICS, MetricName
from ddsr_core.pipeline.config import PipelineConfig, merge
from ddsr_core.sr.config import TrainSRConfig

#: Every variant is compared with this one, seed by seed.
REFERENCE = "random"
#: Statistics of a training set's images in tables: name, heading, digits.
STATISTICS = (
    ("psnr_bic_mean", "PSNR_bic of the images, dB", 2),
    ("psnr_bic_real_mean", "PSNR_bic of the accepted patches, dB", 2),
    ("max_cosine_to_train", "max cosine to a patch", 3),
    ("own_cluster_share", "own-cluster share, as sampled", 2),
    ("precision", "precision, as sampled", 2),
    ("recall", "recall, as sampled", 2),
    ("psnr_bic_distance_db", "distance in PSNR_bic, as sampled, dB", 2),
)


@dataclass(frozen=True)
class Variant:
    """One kind of training set in an experiment.

    Attributes:
        name: in tables and files.
        meaning: what it is, for the legend of a table.
        changes: fields that differ from the config of the experiment.
        source: ``distilled``, or the training set that the networks are trained on instead.
        images: size of the set; None for the config's ``sample.count`` or for the full data.
    """

    name: str
    meaning: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    source: TrainingSetName = "distilled"
    images: int | None = None

    def config(self, base: PipelineConfig, seed: int) -> PipelineConfig:
        """The config of this variant and seed."""
        seeded: dict[str, Any] = {"finetune": {"seed": seed}, "sample": {"seed": seed}, "sr": {"seeds": (seed,)}}
        if self.images is not None:
            seeded["sample"]["count"] = self.images
        return PipelineConfig.model_validate(merge(merge(base.model_dump(), self.changes), seeded))


@dataclass(frozen=True)
class Network:
    """An SR network of an experiment: its name in tables, its architecture, and the fields of its recipe that differ."""

    name: str
    arch: str
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def config(self, base: PipelineConfig, seed: int) -> TrainSRConfig:
        """The config of its training stage."""
        return TrainSRConfig.model_validate(merge(base.sr.recipe(self.arch, seed).model_dump(), self.recipe))


#: Images as the diffusion model samples them: none is selected, none restored.
_AS_SAMPLED = {"oversample": 1, "max_cosine": 1.0, "detail_restoration": 0.0}
_WITHOUT_EXTRA_LOSSES = {"lambda_r": 0.0, "lambda_d": 0.0, "lsr_mode": "off"}

#: The parts of the method, added one at a time.
ABLATION = (
    Variant(
        "base",
        TRAINING_SETS["base"].meaning,
        {"finetune": {"steps": 0, "epochs": None}, "sample": _AS_SAMPLED},
    ),
    Variant(
        "difffit", "fine-tuned by DiffFit with L_simple alone", {"finetune": _WITHOUT_EXTRA_LOSSES, "sample": _AS_SAMPLED}
    ),
    Variant("minimax", "`difffit` + L_r and L_d", {"finetune": {"lsr_mode": "off"}, "sample": _AS_SAMPLED}),
    Variant(
        "lsr-paper", "`minimax` + L_SR as the paper words it", {"finetune": {"lsr_mode": "pixels"}, "sample": _AS_SAMPLED}
    ),
    Variant(
        "lsr-target",
        "`minimax` + L_SR with `lsr_mode=target`",
        {"finetune": {"lsr_mode": "target"}, "sample": _AS_SAMPLED},
    ),
    Variant(
        "select",
        "`lsr-target`, over-sampled and selected",
        {"finetune": {"lsr_mode": "target"}, "sample": {"detail_restoration": 0.0}},
    ),
    Variant(
        "restored",
        f"`select` with restored detail: {RESTORED_MEANING}",
        {"finetune": {"lsr_mode": "target"}, "sample": {"detail_restoration": 1.0}},
    ),
)


def baseline(kind: TrainingSetName, images: int | None = None) -> Variant:
    """A training set that distilled sets are compared with. In restored crops, all detail is restored."""
    changes = {"sample": {"detail_restoration": 1.0}} if kind in RESTORED_CROPS else {}
    return Variant(TRAINING_SETS[kind].label, TRAINING_SETS[kind].meaning, changes, kind, images)


BASELINES = tuple(baseline(kind) for kind in ("random", "threshold", *RESTORED_CROPS, "full"))


@dataclass(frozen=True)
class Design:
    """An experiment: its training sets, its networks, and the layout of its tables.

    Attributes:
        name: of the experiment and its files.
        distilled: at least one.
        baselines: what the distilled sets are compared with.
        networks: empty for those of the config, ``sr.archs``.
        columns: what the columns of its tables are; None for one row per training set and network.
        metrics: shown in its tables and plots.
        title: above the tables.
        notes: below the tables.
        paper_rows: names of training sets under which the paper's figures are printed, because they were made alike.
    """

    name: str
    distilled: tuple[Variant, ...]
    baselines: tuple[Variant, ...]
    networks: tuple[Network, ...] = ()
    columns: Literal["images", "iterations"] | None = None
    metrics: tuple[MetricName, ...] = ("psnr_y", "ssim_y", "lpips")
    title: str = ""
    notes: tuple[str, ...] = ()
    paper_rows: frozenset[str] = frozenset()

    @property
    def variants(self) -> tuple[Variant, ...]:
        return (*self.distilled, *self.baselines)

    def networks_of(self, config: PipelineConfig) -> tuple[Network, ...]:
        """The networks of the design; those of the config if it names none."""
        return self.networks or tuple(Network(arch, arch) for arch in config.sr.archs)


ABLATION_DESIGN = Design("ablation", ABLATION, BASELINES)


@dataclass(frozen=True)
class Cell:
    """One trained and measured SR network of an experiment.

    Attributes:
        variant: name of its training set.
        network: its name in tables.
        metrics: means over the test photos, such as ``psnr_y``.
        statistics: of its training images, such as ``psnr_bic_mean``; empty for training sets that have none.
        images: size of its training set; None for all photos or all accepted patches.
        iterations: of its training.
        costs: seconds of the builds of set and network, such as ``finetune_s``, and of CPU, such as ``finetune_cpu_s``
            (`ddsr_core.experiments.costs`).
    """

    variant: str
    network: str
    seed: int
    metrics: Mapping[str, float]
    statistics: Mapping[str, float] = field(default_factory=dict)
    images: int | None = None
    iterations: int | None = None
    costs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds. The deviation of a single seed is 0."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))

    def text(self, digits: int, sign: str = "") -> str:
        """Such as ``25.20 ± 0.03``; without deviation for one seed. ``sign="+"`` writes a plus before a positive mean."""
        deviation = f" ± {self.deviation:.{digits}f}" if self.count > 1 else ""
        return f"{self.mean:{sign}.{digits}f}{deviation}"


def summarize(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """One row per variant and network, in the order of their first cells: `Spread` of every metric and statistic.

    ``difference`` is PSNR-Y minus that of random crops, taken seed by seed; None if no seed has both.
    """
    cells = list(cells)
    reference = {(cell.network, cell.seed): cell.metrics["psnr_y"] for cell in cells if cell.variant == REFERENCE}
    rows = []
    for variant, network in dict.fromkeys((cell.variant, cell.network) for cell in cells):
        mine = [cell for cell in cells if (cell.variant, cell.network) == (variant, network)]
        paired = [c.metrics["psnr_y"] - reference[network, c.seed] for c in mine if (network, c.seed) in reference]
        rows.append(
            {
                "variant": variant,
                "network": network,
                "seeds": len(mine),
                "metrics": {name: Spread.of([cell.metrics[name] for cell in mine]) for name in mine[0].metrics},
                "statistics": {name: Spread.of([cell.statistics[name] for cell in mine]) for name in mine[0].statistics},
                "difference": Spread.of(paired) if paired else None,
            }
        )
    return rows


def seeds_note(cells: Sequence[Cell]) -> str:
    """The sentence under a table that says what its numbers are."""
    if len({cell.seed for cell in cells}) <= 1:
        return "One seed: differences may be noise. Run at least three seeds before you draw a conclusion."
    return "Mean ± sample standard deviation over seeds; differences are taken seed by seed."


def as_markdown(cells: Sequence[Cell], bicubic: Mapping[str, float], design: Design, about: str) -> str:
    """The table of an experiment without columns: how it was made, one row per training set and network, the legend."""
    metrics = [METRICS[name] for name in design.metrics if name in bicubic]
    header = ["training set", "network", "seeds", *(metric.heading for metric in metrics), "against random, dB"]
    header += [heading for _, heading, _ in STATISTICS]
    bicubic_row = [
        "bicubic",
        "",
        "",
        *(metric.text(bicubic[metric.name]) for metric in metrics),
        "",
        *("" for _ in STATISTICS),
    ]
    lines = [about, "", markdown_row(header), markdown_row(["---"] * len(header)), markdown_row(bicubic_row)]
    for row in summarize(cells):
        difference = row["difference"]
        values = [row["metrics"][metric.name].text(metric.digits) for metric in metrics]
        statistics = [
            row["statistics"][name].text(digits) if name in row["statistics"] else "" for name, _, digits in STATISTICS
        ]
        against = difference.text(3) if difference and row["variant"] != REFERENCE else ""
        lines.append(markdown_row([row["variant"], row["network"], str(row["seeds"]), *values, against, *statistics]))
    lines += ["", seeds_note(cells), "", *legend(design)]
    return "\n".join(lines) + "\n"


def legend(design: Design) -> list[str]:
    """One line per training set: its name and what it is."""
    meanings = {variant.name: variant.meaning for variant in design.variants}
    return [f"- `{name}`: {meaning}" for name, meaning in meanings.items()]


def markdown_row(values: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(values)} |"


def as_csv(cells: Iterable[Cell]) -> str:
    """One row per cell, with every metric, statistic and cost as it was measured."""
    cells = list(cells)
    names = sorted({name for cell in cells for name in cell.metrics})
    statistics = sorted({name for cell in cells for name in cell.statistics})
    costs = sorted({name for cell in cells for name in cell.costs})
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["variant", "network", "images", "iterations", "seed", *names, *statistics, *costs])
    for cell in cells:
        values = [cell.metrics.get(name, "") for name in names] + [cell.statistics.get(name, "") for name in statistics]
        values += [cell.costs.get(name, "") for name in costs]
        writer.writerow([cell.variant, cell.network, cell.images, cell.iterations, cell.seed, *values])
    return buffer.getvalue()


def as_json(cells: Iterable[Cell], bicubic: Mapping[str, float], about: str) -> str:
    """The cells and the bicubic row as JSON."""
    content = {"about": about, "bicubic": dict(bicubic), "cells": [asdict(cell) for cell in cells]}
    return json.dumps(content, indent=2) + "\n"
