"""What a run leaves in the Prefect UI: the table of results and a link to the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact, create_table_artifact


def publish(run_name: str, rows: list[dict[str, Any]], report: Path) -> None:
    """A table artifact with one row an SR network, and a link artifact to ``report.html``."""
    slug = "".join(sign if sign.isalnum() else "-" for sign in run_name.lower()).strip("-")
    create_table_artifact(key=f"ddsr-{slug}-results", table=rows, description=f"Results of the run {run_name}")
    create_link_artifact(
        key=f"ddsr-{slug}-report", link=report.as_uri(), link_text="report.html", description="The run's report"
    )
