"""What a run shows in the Prefect UI: one page per stage, the tables of the run, and the path of its report."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from prefect.artifacts import create_markdown_artifact

from ddsr_core.pipeline.run_state import Outcome, read_record
from ddsr_core.report.data import gather
from ddsr_core.report.verdict import verdict
from ddsr_core.storage.stage import Artifact
from ddsr_core.storage.store import Store
from tasks.previews import pictures, sampled
from tasks.recovery import retry_while_server_down

#: Address of `ddsr serve`, or of a web server for ``<home>/runs``. Browsers refuse file:// links on pages loaded over http.
REPORTS_URL = "DDSR_REPORTS_URL"
#: Key of the summary of every run. The newest one is listed first; the page of each run shows its own.
RUN_KEY = "ddsr-run"
DIGITS = 4


def publish_stage(artifact: Artifact, label: str, cached: bool) -> None:
    """Publish the page of a stage: its inputs, settings and results, and its pictures if there are any.

    Args:
        label: the task run's name.
        cached: whether it was found in the store instead of built.
    """
    manifest = artifact.manifest
    how = "from the cache; originally built" if cached else "built"
    text = [
        f"**{label}**: {how} in {manifest.seconds:.0f} s on {manifest.device}, {manifest.bytes / 1e6:.1f} MB, "
        f"key `{manifest.key}`",
        *(f"![{name}]({uri})" for name, uri in pictures(artifact).items()),
        _table("result", "", manifest.counts),
        _table("setting", "value", manifest.config),
        _table("input", "digest", {name: digest[:16] for name, digest in manifest.parents.items()}),
    ]
    page = "\n\n".join(text)
    retry_while_server_down(
        lambda: create_markdown_artifact(page, key=f"ddsr-{artifact_key(label)}", description=f"{label}: {how}")
    )


@dataclass(frozen=True)
class RunPage:
    """What the page of a run shows.

    Attributes:
        verdict: one sentence on the quality of the distilled set, and the reasons.
        picture: data URI of the distilled set; empty for none.
        results: one row per SR network.
        stages: one row per stage.
    """

    run: str
    verdict: tuple[str, ...]
    picture: str
    results: list[dict[str, Any]]
    stages: list[dict[str, Any]]

    def markdown(self, home: str) -> str:
        """The page. ``home``: a folder or a URL."""
        verdict, *reasons = self.verdict or ("",)
        built = [{**row, "cached": "from the cache" if row["cached"] else "built"} for row in self.stages]
        parts = [
            f"**{verdict}** {' '.join(reasons)}".strip() if verdict else "",
            f"![distilled]({self.picture})" if self.picture else "",
            _rows(self.results),
            _report(self.run, home),
            _rows(built),
        ]
        return "\n\n".join(part for part in parts if part)


def publish_run(outcome: Outcome, store: Store) -> None:
    """Publish the summary of a run under `RUN_KEY`: verdict, picture, results, stages, and the path of ``report.html``."""
    judged = verdict(gather(read_record(store, outcome.run)))
    picture = sampled(outcome.folder / "distilled")["distilled"]
    page = RunPage(outcome.run, (judged.headline, *judged.reasons), picture, outcome.table, outcome.stages)
    text = page.markdown(store.url)
    retry_while_server_down(
        lambda: create_markdown_artifact(text, key=RUN_KEY, description=f"{outcome.run}: {judged.headline}")
    )


def _rows(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of rows with the same names."""
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [" | ".join("" if row.get(name) is None else str(_rounded(row[name])) for name in names) for row in rows]
    return "\n".join(f"| {line} |" for line in (" | ".join(names), " | ".join("---" for _ in names), *lines))


def artifact_key(name: str) -> str:
    """A name as part of the key of a Prefect artifact: lowercase letters a to z, digits and dashes."""
    return "".join(sign if sign.isascii() and sign.isalnum() else "-" for sign in name.lower()).strip("-") or "run"


def _report(run: str, home: str) -> str:
    base = os.environ.get(REPORTS_URL)
    place = f"`{home}/runs/{run}/report.html`" + ("" if "://" in home else f" on {socket.gethostname()}")
    if base:
        return f"[report.html]({base.rstrip('/')}/{quote(run)}/report.html)\n\nThe file is {place}."
    return (
        f"The report is {place}.\n\nBrowsers cannot open local files from this page. For a link, run "
        f"`ddsr serve --home {home}` and set `{REPORTS_URL}` to the address that it prints, in the workers' environment."
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
