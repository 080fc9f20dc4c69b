"""What is read from the artifacts of a run."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddsr_core.baselines.names import TRAINING_SETS
from ddsr_core.errors import InputError
from ddsr_core.report.data import SOURCE_ORDER, gather, read_curves, real_patches, source_rank
from ddsr_core.report.record import RunRecord
from tests.helpers.fake_run import fake_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """One seed. Shared by the tests of this module, which only read it."""
    return fake_run(tmp_path_factory.mktemp("home"), count=28, side=16)


def test_every_source_of_the_pipeline_has_its_place() -> None:
    assert sorted(SOURCE_ORDER) == sorted(TRAINING_SETS)
    order = ["random", "threshold", "k-center", "loss-ranked", "of a user's own", "distilled", "full", "full-thresholded"]
    assert sorted(set(order), key=source_rank) == order


def test_real_patches_are_nearest_and_of_different_photos(run: RunRecord) -> None:
    sheets = real_patches(gather(run), per_cluster=3)
    assert list(sheets) == list(range(7))
    table = pa.concat_tables([pq.read_table(p) for p in sorted(run.stages[0].path.glob("patches-*.parquet"))])
    pixels = {row["image"]["bytes"]: row["patch_id"] for row in table.to_pylist()}
    # label 0 holds patches 0, 7, 14, 21 by distance, of photos 0, 1, 2, 0
    assert [pixels[data] for data in sheets[0]] == [f"{i % 3:016x}_{i}_0" for i in (0, 7, 14)]


def test_curves_without_a_step_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "curves.csv"
    path.write_text("loss\n1\n")
    with pytest.raises(InputError, match="not a table of curves"):
        read_curves(path, "t")
    assert read_curves(tmp_path / "missing.csv", "t") is None


def test_the_share_of_images_near_their_own_cluster_is_counted_from_the_nearest_patches(run: RunRecord) -> None:
    """The fake patches i have label i % 7; the fake images name patch 0, of label 0."""
    report = gather(run)
    assert report.quality is not None
    assert report.quality.own_cluster_share == pytest.approx(1 / 7)
    assert report.quality.precision is None
