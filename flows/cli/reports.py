"""What `ddsr report` does."""

from __future__ import annotations

from pathlib import Path

from ddsr_core.pipeline.run_folder import run_folder
from ddsr_core.pipeline.run_state import read_record
from ddsr_core.report.card import write_data_card
from ddsr_core.report.html import overview_figure, write_report
from ddsr_core.storage.store import Store


def rewrite_report(store: Store, run: str, picture: Path | None) -> dict[str, Path]:
    """Write the report of a finished run from its artifacts, and an overview picture if asked for.

    Raises:
        InputError: no such run, or it is not finished.
    """
    record = read_record(store, run)
    folder = run_folder(store, run)
    written = {"Report": write_report(folder, record)}
    if (folder / "distilled").is_dir():
        written["Data card"] = write_data_card(folder / "distilled", record)
    store.push(f"runs/{run}")
    return written if picture is None else {**written, "Picture": overview_figure(record, picture)}
