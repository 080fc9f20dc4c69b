"""What a run shows in the Prefect UI: a page per stage, the tables of the run, and the place of its report."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from ddsr_core.storage.stage import Artifact
from tasks.previews import pictures
from tasks.recovery import retry_while_server_down

#: Address of a web server that shows ``<home>/runs``. Browsers open no file:// link from a page that comes over http.
REPORTS_URL = "DDSR_REPORTS_URL"
DIGITS = 4


def publish_stage(artifact: Artifact, label: str, cached: bool) -> None:
    """The page of a stage: its inputs, settings and results, and pictures if it has some.

    Args:
        label: the task run's name.
        cached: it was found in the store, not built.
    """
    manifest = artifact.manifest
    verdict = "from the cache; it was built" if cached else "built"
    text = [
        f"**{label}**: {verdict} in {manifest.seconds:.0f} s on {manifest.device}, {manifest.bytes / 1e6:.1f} MB, "
        f"key `{manifest.key}`",
        *(f"![{name}]({uri})" for name, uri in pictures(artifact).items()),
        _table("result", "", manifest.counts),
        _table("setting", "value", manifest.config),
        _table("input", "digest", {name: digest[:16] for name, digest in manifest.parents.items()}),
    ]
    page = "\n\n".join(text)
    retry_while_server_down(
        lambda: create_markdown_artifact(page, key=f"ddsr-{artifact_key(label)}", description=f"{label}: {verdict}")
    )


def publish_run(run: str, results: list[dict[str, Any]], stages: list[dict[str, Any]], home: str) -> None:
    """Two tables, with one row per SR network and one row per stage, and the place of ``report.html``.

    Args:
        run: its name below ``home/runs``.
        home: a folder or a URL.
    """
    retry_while_server_down(lambda: _publish_run(run, results, stages, home))


def _publish_run(run: str, results: list[dict[str, Any]], stages: list[dict[str, Any]], home: str) -> None:
    slug = artifact_key(run)
    rows = [{name: _rounded(value) for name, value in row.items()} for row in results]
    create_table_artifact(key=f"ddsr-{slug}-results", table=rows, description=f"Results of the run {run}")
    verdicts = [{**row, "cached": "from the cache" if row["cached"] else "built"} for row in stages]
    create_table_artifact(key=f"ddsr-{slug}-stages", table=verdicts, description=f"Stages of the run {run}")
    create_markdown_artifact(_report(run, home), key=f"ddsr-{slug}-report", description=f"Report of the run {run}")


def artifact_key(name: str) -> str:
    """A name as part of the key of a Prefect artifact: lowercase letters a to z, digits and dashes."""
    return "".join(sign if sign.isascii() and sign.isalnum() else "-" for sign in name.lower()).strip("-") or "run"


def _report(run: str, home: str) -> str:
    base = os.environ.get(REPORTS_URL)
    place = f"`{home}/runs/{run}/report.html`" + ("" if "://" in home else f" on {socket.gethostname()}")
    if base:
        return f"[report.html]({base.rstrip('/')}/{quote(run)}/report.html)\n\nThe file is {place}."
    return (
        f"The report is {place}.\n\nA browser opens no file from here. To get a link, serve `{home}/runs` with a web server "
        f"and set `{REPORTS_URL}` to its address for the workers."
    )


def _table(head: str, value: str, items: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {_rounded(item)} |" for name, item in _flat(items)]
    return "\n".join([f"| {head} | {value} |", "|---|---|", *rows]) if rows else ""


def _flat(items: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in items.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _rounded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return ", ".join(str(_rounded(item)) for item in value)
    return float(f"{value:.{DIGITS + 2}g}") if isinstance(value, float) else value
