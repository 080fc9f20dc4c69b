"""The results table: rows, stars, differences, and the files written from it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from ddsr_core.report.data import gather
from ddsr_core.report.html import write_report
from ddsr_core.report.record import RunRecord
from ddsr_core.report.table import metrics_shown, table_rows
from tests.helpers.fake_run import fake_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """One seed. Shared by the tests of this module, which only read it."""
    return fake_run(tmp_path_factory.mktemp("home"), count=28, side=16)


@pytest.fixture(scope="module")
def three_seeds(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """Shared by the tests of this module, which only read it."""
    return fake_run(tmp_path_factory.mktemp("seeds"), count=28, side=16, seeds=(0, 1, 2))


def test_best_lpips_is_the_lowest(three_seeds: RunRecord) -> None:
    rows = {row.source: row for row in table_rows(gather(three_seeds))}
    assert list(rows) == ["random", "threshold", "distilled", "full"]
    assert rows["distilled"].best == {"psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "lpips"}  # fake LPIPS falls with PSNR
    assert rows["random"].best == rows["full"].best == frozenset()
    assert [row.to_full for row in rows.values()] == [pytest.approx(-1.0), pytest.approx(-0.75), pytest.approx(-0.5), None]
    assert [row.to_random for row in rows.values()] == [
        None,
        pytest.approx(0.25),
        pytest.approx(0.5),
        None,
    ]  # the full set has another budget


def test_a_metric_that_was_asked_for_gets_a_column_and_lower_is_better_where_it_is(three_seeds: RunRecord) -> None:
    report = gather(three_seeds)
    values = {"random": 0.2, "threshold": 0.3, "distilled": 0.1, "full": 0.05}
    sr = tuple(
        result.model_copy(update={"metrics": {**result.metrics, "dists": values[result.record.source]}})
        for result in report.sr
    )
    rows = {row.source: row for row in table_rows(report.model_copy(update={"sr": sr}))}
    assert metrics_shown(report)[-1] == "lpips"
    assert metrics_shown(report.model_copy(update={"sr": sr}))[-1] == "dists"
    assert {name for name, row in rows.items() if "dists" in row.best} == {"distilled"}


def test_the_thresholded_full_set_gets_no_star_either(three_seeds: RunRecord) -> None:
    whole = tuple(r.model_copy(update={"source": "full-thresholded"}) for r in three_seeds.sr if r.source == "full")
    rows = {row.source: row for row in table_rows(gather(three_seeds.model_copy(update={"sr": three_seeds.sr + whole})))}
    assert rows["full-thresholded"].best == frozenset()
    assert "psnr_y" in rows["distilled"].best


def test_random_crop_is_compared_at_the_same_budget(run: RunRecord) -> None:
    smaller = tuple(r.model_copy(update={"budget": 7}) for r in run.sr if r.source == "distilled")
    rows = table_rows(gather(run.model_copy(update={"sr": run.sr + smaller})))
    ours = {row.budget: (row.to_random, row.to_full) for row in rows if row.source == "distilled"}
    assert ours == {28: (0.5, -0.5), 7: (None, -0.5)}


def test_seeds_are_averaged_with_their_spread(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "home", count=14, side=16, seeds=(0, 2))
    row = next(row for row in table_rows(gather(run)) if row.source == "distilled")
    assert (row.seeds, row.metrics["psnr_y"]) == (2, 25.5)
    assert row.spread["psnr_y"] == pytest.approx(2**0.5)  # sample deviation of 24.5 and 26.5


def test_tables_hold_the_same_rows(run: RunRecord, tmp_path: Path) -> None:
    write_report(tmp_path / "run", run)
    with (tmp_path / "run" / "tables" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["source"] for row in rows] == ["", "random", "threshold", "distilled", "full"]
    assert (rows[0]["arch"], rows[3]["psnr_y"], rows[3]["psnr_y_to_full"]) == ("bicubic", "24.5000", "-0.5000")
    lines = (tmp_path / "run" / "tables" / "results.md").read_text().splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1
