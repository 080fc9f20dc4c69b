"""Experiments: what the variants change, and how cells become tables."""

import csv
import io
import json

import pytest

from ddsr_core.experiments.design import (
    ABLATION,
    ABLATION_DESIGN,
    BASELINES,
    Cell,
    Spread,
    as_csv,
    as_json,
    as_markdown,
    summarize,
)
from ddsr_core.pipeline.config import load_config

CELLS = [
    Cell(
        "base", "edsr", 0, {"psnr_y": 25.0, "ssim_y": 0.7, "lpips": 0.3}, {"psnr_bic_mean": 28.0, "psnr_bic_real_mean": 21.5}
    ),
    Cell("random", "edsr", 0, {"psnr_y": 26.0, "ssim_y": 0.8, "lpips": 0.2}),
    Cell(
        "base", "edsr", 1, {"psnr_y": 26.0, "ssim_y": 0.6, "lpips": 0.5}, {"psnr_bic_mean": 30.0, "psnr_bic_real_mean": 21.5}
    ),
    Cell("random", "edsr", 1, {"psnr_y": 26.4, "ssim_y": 0.8, "lpips": 0.2}),
    Cell(
        "base", "edsr", 2, {"psnr_y": 99.0, "ssim_y": 0.5, "lpips": 0.4}, {"psnr_bic_mean": 29.0, "psnr_bic_real_mean": 21.5}
    ),
]


def test_each_variant_adds_one_part():
    config = load_config("demo", protocol="mini")
    made = {variant.name: variant.config(config, seed=5) for variant in ABLATION}
    assert list(made) == ["base", "difffit", "minimax", "lsr-paper", "lsr-target", "select", "restored"]
    assert made["base"].finetune.total_steps(100) == 0
    terms = {name: (c.finetune.lambda_r > 0, c.finetune.lsr_mode) for name, c in made.items()}
    assert terms["difffit"] == (False, "off")
    assert terms["minimax"] == (True, "off")
    assert terms["lsr-paper"] == (True, "pixels")
    assert terms["lsr-target"] == terms["select"] == (True, "target")
    assert [c.sample.oversample for c in made.values()] == [
        1,
        1,
        1,
        1,
        1,
        config.sample.oversample,
        config.sample.oversample,
    ]
    assert [c.sample.detail_restoration for c in made.values()] == [0, 0, 0, 0, 0, 0, 1]
    assert made["lsr-target"].finetune == made["select"].finetune  # one adapter serves both
    assert len({c.sample.count for c in made.values()}) == 1
    assert all((c.finetune.seed, c.sample.seed) == (5, 5) for c in made.values())


def test_mean_and_sample_deviation():
    assert Spread.of([1.0, 2.0, 4.0]).text(2) == "2.33 ± 1.53"
    assert Spread.of([3.0]).deviation == 0


def test_differences_are_taken_seed_by_seed():
    rows = {row["variant"]: row for row in summarize(CELLS)}
    assert rows["base"]["seeds"] == 3
    assert rows["base"]["difference"] == Spread(pytest.approx(-0.7), pytest.approx(0.424264, rel=1e-5), 2)
    assert rows["base"]["metrics"]["psnr_y"].mean == 50
    assert rows["random"]["difference"].mean == 0
    assert rows["base"]["statistics"]["psnr_bic_mean"].mean == 29


def test_the_table_has_one_row_per_training_set_and_a_legend():
    text = as_markdown(CELLS, {"psnr_y": 24.9, "ssim_y": 0.66, "lpips": 0.4}, ABLATION_DESIGN, "how it was made")
    lines = text.splitlines()
    assert lines[0] == "how it was made"
    table = [line for line in lines if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table] == ["training set", "---", "bicubic", "base", "random"]
    assert len({line.count("|") for line in table}) == 1
    assert "-0.700 ± 0.424" in text
    assert "| 29.00 ± 1.00 | 21.50 ± 0.00 |" in text  # samples beside the real patches that they should resemble
    assert all(f"- `{variant.name}`: {variant.meaning}" in text for variant in (*ABLATION, *BASELINES))
    assert "teacher SR network" in next(line for line in lines if line.startswith("- `restored`"))


def test_csv_holds_every_cell():
    rows = list(csv.DictReader(io.StringIO(as_csv(CELLS))))
    assert [(row["variant"], row["seed"]) for row in rows] == [(c.variant, str(c.seed)) for c in CELLS]
    assert rows[0]["psnr_bic_mean"] == "28.0"
    assert rows[1]["psnr_bic_mean"] == ""


def test_json_holds_every_cell():
    content = json.loads(as_json(CELLS, {"psnr_y": 24.9}, "how it was made"))
    assert content["bicubic"] == {"psnr_y": 24.9}
    assert [Cell(**cell) for cell in content["cells"]] == CELLS


def test_a_baseline_has_the_seed_and_the_budget_of_the_distilled_sets():
    config = load_config("demo", protocol="mini")
    design = ABLATION_DESIGN
    made = [variant.config(config, seed=7) for variant in design.variants]
    assert {c.sr.seeds for c in made} == {(7,)}
    assert {c.sample.count for c in made} == {config.sample.count}
    assert [variant.source for variant in design.baselines] == [
        "random", "threshold", "random-restored", "threshold-restored", "full",
    ]  # fmt: skip
    assert {variant.source for variant in design.distilled} == {"distilled"}
