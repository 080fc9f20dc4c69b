"""The comparison of recipes, at toy size."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import base_recipe
from ddsr_core.pretrain.config import PretrainConfig


def test_every_recipe_is_a_config():
    for changes in base_recipe.RECIPES.values():
        PretrainConfig(**{**base_recipe.COMMON, **changes})


@pytest.mark.slow
def test_recipes_are_compared_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rng = np.random.default_rng(0)
    for name, count in (("train", 16), ("held_out", 8)):
        np.save(tmp_path / f"{name}.npy", rng.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8))
    arguments = [
        str(tmp_path),
        "--work",
        str(tmp_path / "work"),
        "--cpu-minutes",
        "0",
        "--samples",
        "8",
        "--only",
        "no REPA",
    ]
    base_recipe.main(arguments)
    base_recipe.main(arguments)
    rows = [json.loads(line) for line in (tmp_path / "work/results.jsonl").read_text().splitlines()]
    assert [row["recipe"] for row in rows] == ["no REPA"]
    assert rows[0]["samples"] == 32
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("| recipe | samples seen | Frechet |")
    assert [line.split(" | ")[0] for line in table[2:4]] == ["| real training patches", "| no REPA"]
    assert (tmp_path / "work/no-REPA.png").is_file()
