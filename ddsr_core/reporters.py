"""Training curves in the programs that people watch them in: TensorBoard, trackio, Weights & Biases, MLflow.

A trainer opens `Runtime.reporter` and sends it numbers and pictures; the caller decides where they go. Nothing that is
reported enters an artifact.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from ddsr_core.errors import ConfigError

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


def reporter_to(kind: str, folder: Path) -> OpenReporter:
    """An `OpenReporter` for one of the programs.

    Args:
        kind: a `ReporterName`.
        folder: where the program writes, if it writes files: one subfolder per training (TensorBoard), ``wandb/`` or
            ``mlruns/``. ``TRACKIO_DIR``, ``WANDB_MODE`` and ``MLFLOW_TRACKING_URI`` have their usual meaning.

    Raises:
        ConfigError: unknown program, or its package is not installed.
    """
    if kind not in get_args(ReporterName):
        raise ConfigError(
            f"cannot report to {kind!r}", where="report_to", fix=f"use one of {', '.join(get_args(ReporterName))}"
        )
    if find_spec(kind) is None:
        raise ConfigError(f"{kind} is not installed", where="report_to", fix=f"pip install 'ddsr[{kind}]'")

    @contextmanager
    def opened(name: str, settings: Mapping[str, Any]) -> Iterator[Reporter]:
        folder.mkdir(parents=True, exist_ok=True)
        reporter = _KINDS[kind](name, _flat(settings), folder)
        try:
            yield reporter
        finally:
            reporter.close()

    return opened


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
