"""Write the report of a run: ``report.html`` (one file, nothing fetched), ``report.json`` and result tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddsr_core.imaging.decode import decode_rgb, read_rgb
from ddsr_core.report import figures
from ddsr_core.report.data import (
    DISTILLED,
    Curves,
    Report,
    RunRecord,
    SrResult,
    gather,
    psnr_bic_groups,
    read_curves,
    real_patches,
)
from ddsr_core.report.table import as_csv, as_markdown, number, plain_table, table_rows
from ddsr_core.storage.files import write_atomically, write_json

TEMPLATE = "report.html.j2"
HEADINGS = {
    "psnr_y": "PSNR-Y, dB",
    "ssim_y": "SSIM-Y",
    "psnr_rgb": "PSNR-RGB, dB",
    "ssim_rgb": "SSIM-RGB",
    "lpips": "LPIPS",
}
PER_CLUSTER = 10
MAX_CLUSTERS = 50
#: Close-ups in a report; with many networks fewer test images are shown, so that the file stays small.
MAX_CLOSEUPS = 48


def write_report(run_dir: Path, record: RunRecord) -> Path:
    """Write the report of a run into its folder and return the path of ``report.html``.

    Parts that the run does not have are left out (null in ``report.json``).

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
    write_atomically(path, render(report).encode())
    return path


def overview_figure(record: RunRecord, path: Path, per_cluster: int = 2) -> Path:
    """Write a PNG of a run at a glance: real patches above distilled ones per cluster, and a row of SR crops."""
    report = gather(record)
    real = real_patches(report, per_cluster)
    made = _distilled_by_label(report)
    labels = sorted({*real, *made})[:MAX_CLUSTERS]
    clusters = [
        (f"cluster {label}", real.get(label, []), [image.path for image in made.get(label, [])[:per_cluster]])
        for label in labels
    ]
    first = next(_closeups(report), None)
    crops: list[tuple[str, np.ndarray]] = []
    title = ""
    if first is not None:
        arch, tiles = first.rows[0]
        title = f"{arch}, trained on:"
        crops = [(t.caption, t.pixels) for t in (*first.reference, *tiles)]
    return figures.overview(clusters, crops, title, path)


def render(report: Report) -> str:
    """The page, as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ddsr_core.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "percent": percent, "duration": duration}
    groups, rows = psnr_bic_groups(report), table_rows(report)
    return environment.get_template(TEMPLATE).render(
        report=report,
        run=report.run,
        headings=HEADINGS,
        rows=rows,
        headlines=[row for row in rows if row.source == DISTILLED],
        test_images=max((result.test_images for result in report.sr), default=0),
        sheets=list(_sheets(report)),
        hidden_clusters=max(0, (report.clusters.k if report.clusters else 0) - MAX_CLUSTERS),
        histogram=figures.histogram(groups, title="Histogram of PSNR_bic", x_label="PSNR_bic, dB"),
        histogram_groups=[(name, len(values), float(np.median(values))) for name, values in groups.items()],
        closeups=list(_closeups(report)),
        finetune_charts=_finetune_charts(report),
        sr_charts=_sr_charts(report),
        total_seconds=sum(stage.seconds for stage in report.run.stages),
        config=json.dumps(report.run.config, indent=2, ensure_ascii=False, default=str),
        license=license_note(_base_name(report.run.config)),
    )


@dataclass(frozen=True)
class Tile:
    """One picture of the page with what is said about it."""

    uri: str
    caption: str
    detail: str
    pixels: np.ndarray


@dataclass(frozen=True)
class Sheet:
    """Real patches and distilled images of one pseudo-label."""

    label: int
    size: int | None
    real: list[Tile]
    distilled: list[Tile]


@dataclass(frozen=True)
class Closeup:
    """One place of a test image: HR and bicubic, and a row of SR crops an architecture."""

    image: str
    reference: list[Tile]
    rows: list[tuple[str, list[Tile]]]


def _sheets(report: Report) -> Iterator[Sheet]:
    real, made = real_patches(report, PER_CLUSTER), _distilled_by_label(report)
    sizes = report.clusters.sizes if report.clusters else ()
    for label in sorted({*real, *made})[:MAX_CLUSTERS]:
        yield Sheet(
            label=label,
            size=sizes[label] if 0 <= label < len(sizes) else None,
            real=[_thumb(decode_rgb(data, f"patch of cluster {label}"), "real patch", "") for data in real.get(label, [])],
            distilled=[
                _thumb(read_rgb(image.path), "distilled image", _db(image.psnr_bic, "PSNR_bic "))
                for image in made.get(label, [])[: 2 * PER_CLUSTER]
            ],
        )


def _distilled_by_label(report: Report) -> dict[int, list[Any]]:
    made: dict[int, list[Any]] = {}
    for image in report.distilled.images if report.distilled else ():
        made.setdefault(-1 if image.pseudo_label is None else image.pseudo_label, []).append(image)
    return made


def _thumb(image: np.ndarray, caption: str, detail: str) -> Tile:
    return Tile(figures.thumbnail_uri(image), caption, detail, image)


def _closeups(report: Report) -> Iterator[Closeup]:
    """Close-ups of the first seed of every (architecture, source), for as many test images as fit the page."""
    shown: dict[tuple[str, str], SrResult] = {}
    for result in report.sr:
        if result.crops:
            shown.setdefault((result.record.arch, result.record.source), result)
    results = list(shown.values())
    if not results:
        return
    count = max(1, MAX_CLOSEUPS // (len(results) + 2))
    for crop in results[0].crops[:count]:
        hr = read_rgb(crop.hr)
        rows: dict[str, list[Tile]] = {}
        for result in results:
            own = next((c for c in result.crops if c.image == crop.image), None)
            if own is not None:
                tile = _closeup_tile(read_rgb(own.sr), hr, result.record.source)
                rows.setdefault(result.record.arch, []).append(tile)
        reference = [Tile(figures.exact_uri(hr), "HR", "ground truth", hr)]
        reference.append(_closeup_tile(read_rgb(crop.bicubic), hr, "bicubic"))
        yield Closeup(crop.image, reference, list(rows.items()))


def _closeup_tile(image: np.ndarray, hr: np.ndarray, caption: str) -> Tile:
    return Tile(figures.exact_uri(image), caption, _db(figures.crop_psnr(image, hr)), image)


def _db(value: float | None, before: str = "") -> str:
    return "" if value is None else f"{before}{value:.2f} dB"


def _finetune_charts(report: Report) -> list[tuple[str, str]]:
    folder = report.run.path_of("finetune")
    curves = read_curves(folder / "curves.csv", "Fine-tuning") if folder else None
    if curves is None:
        return []
    terms = {name: values for name, values in curves.terms.items() if not _is_rate(name)}
    return [(name, _chart({name: (curves, name)}, f"Fine-tuning: {name}", name)) for name in terms]


def _sr_charts(report: Report) -> list[tuple[str, list[str], str]]:
    """(architecture, sources in the order of their colors, SVG); the first seed of each source."""
    found: dict[str, dict[str, tuple[Curves, str]]] = {}
    for result in report.sr:
        folder, record = result.record.train_path, result.record
        curves = read_curves(folder / "curves.csv", record.source) if folder else None
        if curves is not None and "loss" in curves.terms:
            found.setdefault(record.arch, {}).setdefault(record.source, (curves, "loss"))
    return [(arch, list(lines), _chart(lines, f"Training loss of {arch}", "L1 loss")) for arch, lines in found.items()]


def _is_rate(name: str) -> bool:
    return name in {"learning_rate", "lr", "seconds", "grad_norm"}


def _chart(lines: dict[str, tuple[Curves, str]], title: str, y_label: str) -> str:
    series = {name: (np.array(c.steps), np.array(c.terms[term])) for name, (c, term) in lines.items()}
    return figures.line_chart(series, title=title, x_label="step", y_label=y_label)


def signed(value: float | None, digits: int = 2) -> str:
    """``value`` with its sign, a true minus."""
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def percent(value: float | None) -> str:
    """A share in percent, three significant digits.

    >>> percent(0.00684), percent(0.5)
    ('0.684%', '50%')
    """
    return "–" if value is None else f"{100 * value:.3g}%"


def duration(seconds: float) -> str:
    """
    >>> duration(3.21), duration(75), duration(7_325)
    ('3.2 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _base_name(config: dict[str, Any]) -> str | None:
    """The base model that a run's config names under ``base``, at the top or in a stage."""
    for value in (config.get("base"), *(v.get("base") for v in config.values() if isinstance(v, dict))):
        if isinstance(value, str):
            return value
    return None


def license_note(base: str | None) -> str:
    """What the license of the base model's weights means for the images made with it."""
    if base is None:
        return "The run does not name its base model; see the license of its weights before you share the images."
    if "dit-xl" in base.lower():
        return (
            f"The base model {base} is under CC-BY-NC-4.0: non-commercial use only. Whether images made with it carry "
            "that limit is not settled; treat the distilled set as non-commercial."
        )
    if base.rstrip("/").endswith("ddsr-tiny"):
        return (
            "The base model ddsr-tiny was trained for this project on freely licensed photographs; its model card "
            "names them. The distilled set also rests on your photos: their licenses apply to it."
        )
    return f"The base model is {base}; see its license before you share its weights or images made with it."
