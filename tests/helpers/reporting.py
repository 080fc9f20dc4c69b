"""What a training has reported: kept in memory, or read back from TensorBoard's files."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


class Recorder:
    """Keeps what is reported to it.

    Attributes:
        rows: steps and their numbers.
        pictures: names and steps.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[tuple[str, int]] = []

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.rows.append((step, dict(values)))

    def picture(self, name: str, file: Path, step: int) -> None:
        assert file.is_file()
        self.pictures.append((name, step))

    @contextmanager
    def open(self, name: str, settings: Mapping[str, Any]) -> Iterator["Recorder"]:
        self.name, self.settings = name, settings
        yield self


def read_events(folder: Path) -> EventAccumulator:
    """What TensorBoard shows of one training."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def reported_in(finished: Path) -> Path:
    """Where the fixtures of fine-tuning put the logs of the training in ``finished``: beside it, not in the artifact."""
    return finished.with_name(f"{finished.name}-tracking")
