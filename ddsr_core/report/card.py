"""Cards in the format of the Hugging Face Hub: ``README.md`` of a distilled set, and of an SR network."""

from __future__ import annotations

import json
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from ddsr_core.baselines.names import RESTORED_MEANING
from ddsr_core.errors import InputError
from ddsr_core.report.data import Report, SrResult, gather
from ddsr_core.report.license import base_name, license_note
from ddsr_core.report.page import TEMPLATES
from ddsr_core.report.record import RunRecord
from ddsr_core.report.statistics import plural
from ddsr_core.report.table import as_markdown, number, plain_table
from ddsr_core.report.verdict import verdict
from ddsr_core.report.views import figures_of, meanings
from ddsr_core.storage.files import write_atomically

#: Upper ends of the Hub's size categories.
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"))
CARD = "README.md"


def write_data_card(folder: Path, record: RunRecord, repository: str | None = None) -> Path:
    """Write the card of a run's distilled set into its folder.

    Args:
        repository: ``organization/name`` on the Hub, for the example of the card; None: a placeholder.

    Raises:
        InputError: an artifact that the record names cannot be read, or the run has no distilled set.
    """
    report = gather(record)
    path = folder / CARD
    write_atomically(path, data_card(report, repository or "ORGANIZATION/NAME").encode())
    return path


def data_card(report: Report, repository: str) -> str:
    """The card of a distilled set as text: YAML head, use, content, origin, scores, licenses, limits, configuration."""
    if report.distilled is None:
        raise InputError("the run has no distilled set", where=report.run.name, fix="Finish the run first.")
    header, rows = plain_table(report)
    tests = max((result.test_images for result in report.sr), default=0)
    return _rendered(
        "data_card.md.j2",
        title=f"{report.run.name}: distilled images for super-resolution",
        report=report,
        repository=repository,
        size_category=next((name for most, name in SIZES if report.distilled.count < most), "100K<n<1M"),
        photos=plural(report.patches.photos, "photo") if report.patches else "photos",
        restored_meaning=RESTORED_MEANING,
        scale=report.run.config.get("evaluate", {}).get("scale", 4),
        verdict=verdict(report),
        base=base_name(report.run.config) or "unknown",
        key=next((stage.key for stage in report.run.stages if stage.name == "sample"), None),
        figures=figures_of(report),
        tests=plural(tests, "test photo"),
        table=as_markdown(header, rows) if report.sr else "",
        meanings=meanings(report),
        license=license_note(base_name(report.run.config)),
        config=json.dumps(report.run.config, indent=1, ensure_ascii=False, default=str),
    )


def network_card(report: Report, result: SrResult, repository: str) -> str:
    """The card of an SR network of a run as text."""
    record = result.record
    return _rendered(
        "network_card.md.j2",
        title=f"{record.arch} trained on {report.label_of(record.source)} images of {report.run.name}",
        report=report,
        result=result,
        record=record,
        repository=repository,
        label=report.label_of(record.source),
        meaning=meanings(report).get(report.label_of(record.source), ""),
        scale=report.run.config.get("evaluate", {}).get("scale", 4),
        tests=plural(result.test_images, "test photo"),
        license=license_note(base_name(report.run.config)),
    )


def _rendered(template: str, **values: object) -> str:
    """Markdown: nothing is escaped."""
    environment = Environment(  # nosec B701
        loader=TEMPLATES, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["number"] = number
    return environment.get_template(template).render(**values)
