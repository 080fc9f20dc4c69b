"""Training curves in the programs that people watch them in: TensorBoard, trackio, Weights & Biases, MLflow.

A trainer opens `Runtime.reporter` and sends it numbers and pictures; the caller decides where they go. Nothing that is
reported enters an artifact.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict

from ddsr_core.errors import ConfigError

#: Folder below the home that the programs' files go to.
TRACKING = "tracking"
ReporterName = Literal["tensorboard", "trackio", "wandb", "mlflow"]


class Reporter(Protocol):
    """Takes what one training reports."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Report numbers, such as ``{"train/loss": 0.03}``, of a step."""

    def picture(self, name: str, file: Path, step: int) -> None:
        """Report a PNG file of a step. trackio does not take pictures."""


#: ``open_reporter("train_sr-edsr", {"seed": 42})`` -> context manager that yields a `Reporter`.
OpenReporter = Callable[[str, Mapping[str, Any]], AbstractContextManager[Reporter]]


class _Silent:
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        pass

    def picture(self, name: str, file: Path, step: int) -> None:
        pass


@contextmanager
def no_reporter(name: str, settings: Mapping[str, Any]) -> Iterator[Reporter]:
    """An `OpenReporter` that reports nothing."""
    yield _Silent()


def reporter_to(kind: str, folder: Path, run: str = "", label: str = "") -> OpenReporter:
    """An `OpenReporter` for one of the programs. It can be sent to another process.

    Args:
        kind: a `ReporterName`.
        folder: where the program writes, if it writes files: one subfolder per training (TensorBoard), ``wandb/`` or
            ``mlruns/``. ``TRACKIO_DIR``, ``WANDB_MODE`` and ``MLFLOW_TRACKING_URI`` have their usual meaning.
        run: name of the ddsr run, which the name of each training begins with.
        label: name of the training within the run; empty: the name that the trainer gives.

    Raises:
        ConfigError: unknown program, or its package is not installed.
    """
    if kind not in get_args(ReporterName):
        raise ConfigError(
            f"cannot report to {kind!r}", where="report_to", fix=f"use one of {', '.join(get_args(ReporterName))}"
        )
    if find_spec(kind) is None:
        raise ConfigError(f"{kind} is not installed", where="report_to", fix=f"pip install 'ddsr[{kind}]'")

    return _OpenProgram(kind, folder, run, label)


@dataclass(frozen=True)
class _OpenProgram:
    """An `OpenReporter`; see `reporter_to`."""

    kind: str
    folder: Path
    run: str
    label: str

    @contextmanager
    def __call__(self, name: str, settings: Mapping[str, Any]) -> Iterator[Reporter]:
        self.folder.mkdir(parents=True, exist_ok=True)
        title = "/".join(filter(None, (self.run, self.label or name)))
        reporter = _KINDS[self.kind](title, _flat(settings), self.folder)
        try:
            yield reporter
        finally:
            reporter.close()


def named(group: str, row: Mapping[str, float]) -> dict[str, float]:
    """A row of a curve as scalars of a group, without its step.

    >>> named("train", {"step": 3, "loss": 0.5})
    {'train/loss': 0.5}
    """
    return {f"{group}/{name}": value for name, value in row.items() if name != "step"}


class Tracking(BaseModel):
    """Where the curves of one stage are shown, as plain data that can be sent to other processes and machines.

    Attributes:
        to: the program.
        run: name of the ddsr run.
        label: name of the training within the run; empty: the name that the trainer gives.
    """

    model_config = ConfigDict(frozen=True)
    to: ReporterName
    run: str = ""
    label: str = ""


def tracked(tracking: Tracking | None, home: Path) -> OpenReporter:
    """The `OpenReporter` of a stage. The program's files go to ``home/tracking``.

    Raises:
        ConfigError: the program's package is not installed.
    """
    if tracking is None:
        return no_reporter
    return reporter_to(tracking.to, home / TRACKING, tracking.run, tracking.label)


class _TensorBoard:
    def __init__(self, name: str, settings: Mapping[str, Any], folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / name))
        self.writer.add_text("settings", "\n".join(f"- {field}: {value}" for field, value in settings.items()))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, name: str, file: Path, step: int) -> None:
        import numpy as np  # every config imports this module, which stays light
        from PIL import Image

        with Image.open(file) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, name: str, settings: Mapping[str, Any], folder: Path) -> None:
        import wandb

        self.image, self.run = wandb.Image, wandb.init(project="ddsr", name=name, config=dict(settings), dir=str(folder))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, name: str, file: Path, step: int) -> None:
        self.run.log({name: self.image(str(file))}, step=step)

    def close(self) -> None:
        self.run.finish()


class _MLflow:
    def __init__(self, name: str, settings: Mapping[str, Any], folder: Path) -> None:
        import mlflow

        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri((folder / "mlruns").absolute().as_uri())
        mlflow.set_experiment("ddsr")
        self.mlflow, self.run = mlflow, mlflow.start_run(run_name=name)
        mlflow.log_params(dict(settings))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.mlflow.log_metrics(dict(values), step=step)

    def picture(self, name: str, file: Path, step: int) -> None:
        self.mlflow.log_artifact(str(file), name)

    def close(self) -> None:
        self.mlflow.end_run()


class _Trackio:
    def __init__(self, name: str, settings: Mapping[str, Any], folder: Path) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
        import trackio

        self.run = trackio.init(project="ddsr", name=name, config=dict(settings))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, name: str, file: Path, step: int) -> None:
        pass

    def close(self) -> None:
        self.run.finish()


#: The packages are optional, so each class imports its own.
_KINDS: Mapping[str, type[_TensorBoard | _WandB | _MLflow | _Trackio]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one table of numbers and texts.

    >>> _flat({"a": 1, "gan": {"recipe": "realsr", "trunk": None}})
    {'a': 1, 'gan.recipe': 'realsr', 'gan.trunk': 'None'}
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
