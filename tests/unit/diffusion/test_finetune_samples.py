"""Samples during fine-tuning."""

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.tiny_finetuning import load_inputs, read_csv


def test_measured_texture_is_written(finished: Path, inputs: dict[str, Path]):
    rows = read_csv(finished / "texture.csv")
    assert [int(row["step"]) for row in rows] == [0, 3, 6, 9]
    _, data = load_inputs(inputs)
    expected = np.mean([data.latents.psnr_bic[(data.labels == label).numpy()].mean() for label in range(3)])
    assert all(float(row["real_db"]) == pytest.approx(expected, rel=1e-5) for row in rows)
    assert len({row["samples_db"] for row in rows}) == 4
