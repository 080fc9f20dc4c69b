"""Experiments on the method: variants of one config, each with several seeds, and the tables that compare them.

A variant changes a few fields and nothing else, so that all of them share the stages before the change. Within a column
every training set has as many images (but for the whole data), and each network the same recipe and iterations on them; a
seed means the same fine-tuning noise, sampling noise, crops and SR initialization in every variant, so that differences can
be taken seed by seed.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ddsr_core.baselines.names import TrainingSetName
from ddsr_core.pipeline.config import PipelineConfig, merge
from ddsr_core.sr.train import TrainSRConfig

#: What every variant is compared with, seed by seed.
REFERENCE = "random"
METRICS = (("psnr_y", "PSNR-Y, dB", 3), ("ssim_y", "SSIM-Y", 4), ("lpips", "LPIPS", 4))
FACTS = (
    ("psnr_bic_mean", "PSNR_bic of the images, dB", 2),
    ("psnr_bic_real_mean", "of the accepted patches, dB", 2),
    ("max_cosine_to_train", "max cosine to a patch", 3),
)


@dataclass(frozen=True)
class Variant:
    """A training set made in another way: its name, what it is, and the fields that differ from the config.

    Attributes:
        source: ``distilled``, or what the networks are trained on instead.
        images: size of the set; None for the config's ``sample.count``, or where it is all there is.
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
    """An SR network of an experiment: what tables call it, its architecture, and fields of its recipe that differ."""

    name: str
    arch: str
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def config(self, base: PipelineConfig, seed: int) -> TrainSRConfig:
        """The config of its training stage."""
        return TrainSRConfig.model_validate(merge(base.sr.recipe(self.arch, seed).model_dump(), self.recipe))


_AS_DRAWN = {"oversample": 1, "max_cosine": 1.0, "detail_restoration": 0.0}
_BARE = {"lambda_r": 0.0, "lambda_d": 0.0, "lsr_mode": "off"}

#: The parts of the method, added one by one.
ABLATION = (
    Variant("base", "the base model as it is", {"finetune": {"steps": 0, "epochs": None}, "sample": _AS_DRAWN}),
    Variant("difffit", "fine-tuned by DiffFit with L_simple alone", {"finetune": _BARE, "sample": _AS_DRAWN}),
    Variant("minimax", "+ L_r and L_d", {"finetune": {"lsr_mode": "off"}, "sample": _AS_DRAWN}),
    Variant("lsr-paper", "+ L_SR as the paper words it", {"finetune": {"lsr_mode": "pixels"}, "sample": _AS_DRAWN}),
    Variant("lsr-target", "+ L_SR `target` instead", {"finetune": {"lsr_mode": "target"}, "sample": _AS_DRAWN}),
    Variant(
        "select",
        "`lsr-target`, over-sampled and selected",
        {"finetune": {"lsr_mode": "target"}, "sample": {"detail_restoration": 0.0}},
    ),
    Variant(
        "restored",
        "`select`, its detail restored",
        {"finetune": {"lsr_mode": "target"}, "sample": {"detail_restoration": 1.0}},
    ),
)
#: What the variants are measured against: other training sets for the same networks.
BASELINES = (
    Variant("random", "random crops of the photos", source="random"),
    Variant("threshold", "accepted patches, drawn at random", source="threshold"),
    Variant("full", "all photos, as many iterations", source="full"),
)


@dataclass(frozen=True)
class Design:
    """An experiment: its training sets, its networks, and how its table is laid out.

    Attributes:
        name: of the command's choice and of the files.
        distilled: at least one.
        baselines: what the distilled sets are measured against.
        networks: none for those of the config, ``sr.archs``.
        columns: what the columns of its tables are; None for one row a training set and network.
        metrics: what its tables and plots show.
        title, notes: stand above the tables and below them.
        with_paper: whether the paper's cells are comparable and stand under ours.
    """

    name: str
    distilled: tuple[Variant, ...]
    baselines: tuple[Variant, ...]
    networks: tuple[Network, ...] = ()
    columns: Literal["images", "iterations"] | None = None
    metrics: tuple[str, ...] = ("psnr_y", "ssim_y", "lpips")
    title: str = ""
    notes: tuple[str, ...] = ()
    with_paper: bool = False

    @property
    def variants(self) -> tuple[Variant, ...]:
        return (*self.distilled, *self.baselines)

    def networks_of(self, config: PipelineConfig) -> tuple[Network, ...]:
        """Its networks, or those of a config."""
        return self.networks or tuple(Network(arch, arch) for arch in config.sr.archs)


ABLATION_DESIGN = Design("ablation", ABLATION, BASELINES)


@dataclass(frozen=True)
class Cell:
    """One SR network of an experiment.

    Attributes:
        network: what the tables call it.
        metrics: means over the test photos, such as ``psnr_y``.
        images: size of its training set; None if that is all photos or all accepted patches.
        iterations: of its training.
        facts: of its training set, such as ``psnr_bic_mean``; empty where there are none.
    """

    variant: str
    network: str
    seed: int
    metrics: Mapping[str, float]
    facts: Mapping[str, float] = field(default_factory=dict)
    images: int | None = None
    iterations: int | None = None


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; the deviation of a single seed is 0."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))

    def text(self, digits: int) -> str:
        spread = f" ± {self.deviation:.{digits}f}" if self.count > 1 else ""  # one seed has none
        return f"{self.mean:.{digits}f}{spread}"


def summarize(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """A row a variant and network, in the order of their first cells: `Spread` of every metric and fact.

    ``difference`` is that of PSNR-Y to random crops, taken seed by seed; None where no seed has both.
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
                "facts": {name: Spread.of([cell.facts[name] for cell in mine]) for name in mine[0].facts},
                "difference": Spread.of(paired) if paired else None,
            }
        )
    return rows


def seeds_note(cells: Sequence[Cell]) -> str:
    """What the numbers of a table are."""
    if len({cell.seed for cell in cells}) <= 1:
        return "One seed: it says where to look, and nothing can be claimed from it."
    return "Mean ± sample standard deviation over seeds; differences are taken seed by seed."


def as_markdown(cells: Sequence[Cell], bicubic: Mapping[str, float], variants: Sequence[Variant], about: str) -> str:
    """The table with what it was made by above it, and what each variant is below it."""
    measured = [metric for metric in METRICS if metric[0] in bicubic]
    header = ["training set", "network", "seeds", *(title for _, title, _ in measured), "against random, dB"]
    header += [title for _, title, _ in FACTS]
    bicubic_row = [
        "bicubic",
        "",
        "",
        *(f"{bicubic[name]:.{digits}f}" for name, _, digits in measured),
        "",
        *("" for _ in FACTS),
    ]
    lines = [about, "", _line(header), _line(["---"] * len(header)), _line(bicubic_row)]
    for row in summarize(cells):
        difference = row["difference"]
        known = [row["metrics"][name].text(digits) for name, _, digits in measured]
        facts = [row["facts"][name].text(digits) if name in row["facts"] else "" for name, _, digits in FACTS]
        against = difference.text(3) if difference and row["variant"] != REFERENCE else ""
        lines.append(_line([row["variant"], row["network"], str(row["seeds"]), *known, against, *facts]))
    lines += ["", seeds_note(cells), ""]
    lines += [f"- `{variant.name}`: {variant.meaning}" for variant in variants]
    return "\n".join(lines) + "\n"


def _line(values: Iterable[str]) -> str:
    return f"| {' | '.join(values)} |"


def as_csv(cells: Iterable[Cell]) -> str:
    """Every cell as it was measured."""
    cells = list(cells)
    names = sorted({name for cell in cells for name in cell.metrics})
    facts = sorted({name for cell in cells for name in cell.facts})
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["variant", "network", "images", "iterations", "seed", *names, *facts])
    for cell in cells:
        values = [cell.metrics.get(name, "") for name in names] + [cell.facts.get(name, "") for name in facts]
        writer.writerow([cell.variant, cell.network, cell.images, cell.iterations, cell.seed, *values])
    return buffer.getvalue()


def as_json(cells: Iterable[Cell], bicubic: Mapping[str, float], about: str) -> str:
    """What the tables are made of, for programs."""
    facts = {"about": about, "bicubic": dict(bicubic), "cells": [asdict(cell) for cell in cells]}
    return json.dumps(facts, indent=2) + "\n"
