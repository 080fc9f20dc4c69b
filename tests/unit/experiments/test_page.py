"""The page of an experiment: its answer, charts with a dot per seed, tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddsr_core.experiments.design import ABLATION_DESIGN, Cell
from ddsr_core.experiments.page import answers_of, experiment_page
from ddsr_core.experiments.paper_tables import design_of
from ddsr_core.imaging.images import save_png

BICUBIC = {"psnr_y": 25.0, "psnr_rgb": 23.7, "ssim_y": 0.66, "lpips": 0.4}
PSNR_Y = {"distilled + restored": 25.6, "distilled": 25.3, "threshold": 25.35, "random": 25.3, "full": 25.9}
DESIGN = design_of("table2", "mini")


def cells(gain: float, seeds: int = 3) -> list[Cell]:
    """Every cell of `DESIGN`; the distilled set is better than random crops by ``gain`` dB, give or take .01 by seed."""
    result = []
    for seed in range(seeds):
        for variant in DESIGN.variants:
            value = PSNR_Y.get(variant.name, 25.85) + (gain + 0.01 * seed) * (variant.name == "distilled")
            metrics = {"psnr_y": value, "psnr_rgb": value - 1.3, "ssim_y": value / 37, "lpips": 10 / value}
            result += [
                Cell(variant.name, network.name, seed, metrics, {}, variant.images, 1000) for network in DESIGN.networks
            ]
    return result


def text_of(tmp_path: Path, made: list[Cell], total: int | None = None) -> str:
    return experiment_page(made, BICUBIC, DESIGN, "`ddsr reproduce table2`", total or len(made), tmp_path)


@pytest.mark.parametrize(
    ("gain", "headline"),
    [
        (0.2, "The distilled set is better than random crops with every network."),
        (-0.2, "The distilled set is worse than random crops with every network."),
        (-0.01, "no clear difference"),
    ],
)
def test_the_page_answers_first(tmp_path: Path, gain: float, headline: str):
    assert headline in text_of(tmp_path, cells(gain))


def test_two_seeds_cannot_tell(tmp_path: Path):
    assert "Too few seeds to tell: at least 3 are needed." in text_of(tmp_path, cells(0.2, seeds=2))


def test_answers_are_taken_seed_by_seed_at_the_most_images():
    made = {(answer.network, answer.variant): answer for answer in answers_of(cells(0.2), DESIGN)}
    assert made["EDSR", "distilled"].gains == pytest.approx([0.2, 0.21, 0.22])
    assert ("EDSR", "full") not in made  # it has no column that random crops have
    assert str(made["EDSR", "distilled"]) == "distilled, EDSR: +0.210 ± 0.025 dB"


def test_every_seed_is_a_dot_and_every_cell_is_in_a_table(tmp_path: Path):
    page = text_of(tmp_path, cells(0.2))
    lines = 6 * 2  # training sets with columns, numbers of images
    charts = 4 * 2  # metrics, networks
    assert page.count('class="seed') == charts * lines * 3 + 5 * 2 * 3  # and the differences at the head
    assert "25.510 ± 0.010" in page
    assert page.count("<script>") == 1


def test_an_unfinished_experiment_says_so_and_shows_its_sheets(tmp_path: Path):
    save_png(tmp_path / "sheet-random-7.png", np.zeros((64, 64, 3), np.uint8))
    page = text_of(tmp_path, cells(0.2)[:6], total=30)
    assert "6 of 30 networks have been measured so far" in page
    assert 'alt="Contact sheet of random-7"' in page


def test_an_experiment_without_columns_has_one_row_per_training_set(tmp_path: Path):
    made = [Cell(v.name, "edsr", s, {"psnr_y": 25.0 + s, "ssim_y": 0.7, "lpips": 0.3}) for s in (0, 1, 2)
            for v in ABLATION_DESIGN.variants]  # fmt: skip
    page = experiment_page(made, BICUBIC, ABLATION_DESIGN, "about", len(made), tmp_path)
    assert page.count("26.000 ± 1.000") == len(ABLATION_DESIGN.variants)
    assert "Experiment ablation" in page
