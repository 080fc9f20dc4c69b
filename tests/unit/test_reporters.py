"""Where training curves go."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest

from ddsr_core.errors import ConfigError
from ddsr_core.imaging.images import save_png
from ddsr_core.reporters import no_reporter, reporter_to

VALUES = {"train/loss": 0.25, "train/learning_rate": 1e-3}


def report(kind: str, folder: Path) -> None:
    save_png(folder / "grid.png", np.full((8, 12, 3), 200, np.uint8))
    with reporter_to(kind, folder / "logs")("train_sr-edsr", {"seed": 3, "gan": {"recipe": "realsr"}}) as reporter:
        reporter.scalars(VALUES, 10)
        reporter.scalars({"train/loss": 0.125}, 20)
        reporter.picture("grid", folder / "grid.png", 20)


def test_tensorboard_reads_what_is_reported(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    report("tensorboard", tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "logs/train_sr-edsr"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 0.25), (20, 0.125)]
    assert events.Scalars("train/learning_rate")[0].value == pytest.approx(1e-3)
    (picture,) = events.Images("grid")
    assert (picture.step, picture.width, picture.height) == (20, 12, 8)


def test_mlflow_reads_what_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is optional")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    report("mlflow", tmp_path)
    (run,) = mlflow.search_runs(experiment_names=["ddsr"], output_format="list")
    assert run.data.metrics["train/loss"] == 0.125
    assert run.data.params["gan.recipe"] == "realsr"


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[dict, int]] = []
        self.finished = False

    def log(self, values: dict, step: int) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize(("kind", "pictures"), [("wandb", 1), ("trackio", 0)])
def test_numbers_and_pictures_reach_programs_that_are_logged_to(
    kind: str, pictures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, started = FakeRun(), []
    module = types.ModuleType(kind)
    module.init = lambda **options: started.append(options) or run
    module.Image = lambda file: Path(file).name
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, kind, module)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    report(kind, tmp_path)
    assert started[0]["name"] == "train_sr-edsr"
    assert started[0]["config"] == {"seed": 3, "gan.recipe": "realsr"}
    assert run.logged == [(VALUES, 10), ({"train/loss": 0.125}, 20), ({"grid": "grid.png"}, 20)][: 2 + pictures]
    assert run.finished


def test_a_program_that_is_unknown_or_not_installed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="cannot report to 'excel'"):
        reporter_to("excel", tmp_path)
    monkeypatch.setattr("ddsr_core.reporters.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="wandb is not installed") as caught:
        reporter_to("wandb", tmp_path)
    assert "ddsr[wandb]" in str(caught.value)


def test_no_reporter_takes_everything_and_writes_nothing(tmp_path: Path):
    with no_reporter("x", {}) as reporter:
        reporter.scalars(VALUES, 1)
        reporter.picture("grid", tmp_path / "none.png", 1)
    assert list(tmp_path.iterdir()) == []
