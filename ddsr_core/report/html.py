"""Write the report of a run: ``report.html`` (one file that loads nothing else), ``report.json`` and result tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ddsr_core.metrics.spec import METRICS
from ddsr_core.report import charts, figures, views
from ddsr_core.report.advice import next_steps, notices
from ddsr_core.report.cost import cost_of
from ddsr_core.report.data import Report, gather, psnr_bic_groups, real_patches
from ddsr_core.report.license import base_name, license_note
from ddsr_core.report.page import page
from ddsr_core.report.record import RunRecord
from ddsr_core.report.table import as_csv, as_markdown, metrics_shown, plain_table, table_rows
from ddsr_core.report.verdict import verdict
from ddsr_core.storage.files import write_atomically, write_json


def write_report(run_dir: Path, record: RunRecord) -> Path:
    """Write the report of a run into its folder and return the path of ``report.html``.

    Parts that the run lacks are left out (null in ``report.json``).

    Raises:
        InputError: an artifact that the record names cannot be read.
    """
    report = gather(record)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "tables").mkdir(exist_ok=True)
    write_json(run_dir / "report.json", report.to_json())
    header, rows = plain_table(report)
    write_atomically(run_dir / "tables" / "results.csv", as_csv(header, rows).encode())
    write_atomically(run_dir / "tables" / "results.md", as_markdown(header, rows).encode())
    path = run_dir / "report.html"
    write_atomically(path, render(report, run_dir.absolute()).encode())
    return path


def overview_figure(record: RunRecord, path: Path, per_cluster: int = 2) -> Path:
    """Write a PNG that shows a run at a glance: real patches above distilled images per cluster, and a row of SR crops."""
    report = gather(record)
    real = real_patches(report, per_cluster)
    made = views.distilled_by_label(report)
    labels = sorted({*real, *made})[: views.MAX_CLUSTERS]
    clusters = [
        (f"cluster {label}", real.get(label, []), [image.path for image in made.get(label, [])[:per_cluster]])
        for label in labels
    ]
    first = next(views.closeups_of(report), None)
    crops: list[tuple[str, np.ndarray]] = []
    title = ""
    if first is not None:
        arch, tiles = first.rows[0]
        title = f"{arch}, trained on:"
        crops = [(t.caption, t.pixels) for t in (*first.reference, *tiles)]
    return figures.overview(clusters, crops, title, path)


def render(report: Report, run_dir: Path) -> str:
    """The page as text; its commands name the folder of the run, ``run_dir``."""
    groups, judged, sheets = psnr_bic_groups(report), verdict(report), list(views.sheets_of(report))
    return page(
        "report.html.j2",
        report=report,
        run=report.run,
        verdict=judged,
        verdict_chart=views.verdict_chart(judged),
        cost=cost_of(report.run),
        steps=next_steps(report, run_dir, judged.level),
        notices=notices(report),
        flow=views.flow_of(report, sheets),
        metrics=[METRICS[name] for name in metrics_shown(report)],
        meanings=views.meanings(report),
        rows=table_rows(report),
        result_charts=views.result_charts(report),
        test_images=max((result.test_images for result in report.sr), default=0),
        sheets=sheets,
        hidden_clusters=max(0, (report.clusters.k if report.clusters else 0) - views.MAX_CLUSTERS),
        figures=views.figures_of(report),
        histogram=charts.histogram(groups, title="Histogram of PSNR_bic", x_label="PSNR_bic, dB"),
        histogram_groups=[(name, len(values), float(np.median(values))) for name, values in groups.items()],
        closeups=list(views.closeups_of(report)),
        finetune_charts=views.finetune_charts(report),
        sr_charts=views.sr_charts(report),
        config=json.dumps(report.run.config, indent=2, ensure_ascii=False, default=str),
        license=license_note(base_name(report.run.config)),
    )
