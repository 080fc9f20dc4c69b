"""Patches that sampling starts from."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddsr_core.sampling.init_patches import init_patches
from ddsr_core.storage.vector_table import write_table


def test_init_patches_are_spread_over_a_cluster(tmp_path: Path):
    names = ["a", "b", "c", "d"]
    distances = [0.1, 0.2, 0.9, 0.5]
    columns = {"patch_id": names, "pseudo_label": [0] * 4, "distance": distances}
    write_table(tmp_path, [(pa.table(columns), np.array([[0, 0.0], [0, 1], [0, 9], [0, 5]], np.float32))])
    pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
    labels = np.zeros(5, int)
    assert init_patches(labels, tmp_path) == ["a", "b", "d", "c", "a"]
    assert init_patches(labels, tmp_path, "k-center") == ["a", "c", "d", "b", "a"]
