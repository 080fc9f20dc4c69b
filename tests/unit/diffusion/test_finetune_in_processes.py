"""Several processes share a step."""

from pathlib import Path

import pytest

from ddsr_core.config import Runtime
from ddsr_core.diffusion import finetune
from ddsr_core.errors import InputError
from ddsr_core.reporters import reporter_to
from tests.helpers.reporting import read_events
from tests.helpers.tiny_base import write_clusters
from tests.helpers.tiny_finetuning import CONFIG, read_csv


def test_two_processes_have_the_loss_curve_of_one(inputs: dict[str, Path], tmp_path: Path):
    curves = []
    for processes in (1, 2):
        config = CONFIG.model_copy(update={"processes": processes, "precision": "fp32", "norm_every": 3})
        out = tmp_path / str(processes)
        reporter = reporter_to("tensorboard", tmp_path / f"{processes}-tracking")
        finetune.run(config, **inputs, out=out, runtime=Runtime(reporter=reporter))
        assert len(read_events(tmp_path / f"{processes}-tracking/finetune").Scalars("train/simple")) == 12  # process 0 only
        curves.append((read_csv(out / "curves.csv"), read_csv(out / "gradients.csv")))
    for alone, together in zip(*curves, strict=True):
        assert len(alone) == len(together)
        for a, b in zip(alone, together, strict=True):
            assert {k: float(v) for k, v in b.items()} == pytest.approx(
                {k: float(v) for k, v in a.items()}, rel=5e-3, abs=1e-6
            )


def test_an_error_in_one_process_is_the_stages_error(inputs: dict[str, Path], tmp_path: Path):
    many = write_clusters(tmp_path / "clusters", k=13)
    config = CONFIG.model_copy(update={"processes": 2})
    with pytest.raises(InputError, match="13 pseudo-labels do not fit"):
        finetune.run(config, **{**inputs, "clusters": many}, out=tmp_path / "out", runtime=Runtime())
