"""The parts of a report page: charts, picture strips, close-ups, the run as a flow chart, and figures with explanations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ddsr_core.baselines.names import RESTORED_LABEL, RESTORED_MEANING, TRAINING_SETS, label_of
from ddsr_core.imaging.decode import decode_rgb, read_rgb
from ddsr_core.metrics.spec import METRICS
from ddsr_core.report import charts, figures
from ddsr_core.report.data import Curves, DistilledImage, Report, SrResult, read_curves, real_patches, sampled_images
from ddsr_core.report.statistics import plural
from ddsr_core.report.verdict import Verdict

PER_CLUSTER = 10
MAX_CLUSTERS = 50
#: Most close-ups in a report: with many networks fewer test images are shown, so that the file stays small.
MAX_CLOSEUPS = 48
#: Pictures in a box of the flow.
FLOW_TILES = 3
#: Colors of training sets in charts; any other one has `OTHER_COLOR`.
SOURCE_COLORS: Mapping[str, int] = {"random": 0, "threshold": 1, "distilled": 2, "full": 3, "full-thresholded": 5}
OTHER_COLOR = 4
#: Columns of a ``curves.csv`` that are not losses.
NOT_LOSSES = frozenset({"learning_rate", "lr", "seconds", "grad_norm"})
#: Loss terms of fine-tuning: name, and what it measures.
LOSSES: Mapping[str, tuple[str, str]] = {
    "simple": ("L_simple", "error of the predicted noise"),
    "vb": ("L_vlb", "error of the predicted variances"),
    "r": ("L_r", "representativeness: samples close to real patches"),
    "d": ("L_d", "diversity: samples apart from each other"),
    "sr": ("L_SR", "hardness for super-resolution"),
}


def color_of(source: str) -> int:
    """Color of a training set. Crops with restored detail have the color of the crops."""
    known = TRAINING_SETS.get(source)
    return SOURCE_COLORS.get((known.restored_from if known else "") or source, OTHER_COLOR)


def meanings(report: Report) -> dict[str, str]:
    """What each training set of the report is, by the label that its tables use."""
    labels = {report.label_of(name): text.meaning for name, text in TRAINING_SETS.items()}
    labels[RESTORED_LABEL] = RESTORED_MEANING
    used = dict.fromkeys(report.label_of(result.record.source) for result in report.sr)
    return {label: labels[label] for label in used if label in labels}


@dataclass(frozen=True)
class Tile:
    """One picture of the page with its caption."""

    uri: str
    caption: str
    detail: str
    pixels: np.ndarray


@dataclass(frozen=True)
class Sheet:
    """Real patches and distilled images of one pseudo-label; ``sampled``: before restoration, if detail was restored."""

    label: int
    size: int | None
    real: list[Tile]
    sampled: list[Tile]
    distilled: list[Tile]


@dataclass(frozen=True)
class Closeup:
    """One place of a test image: HR and bicubic, and a row of SR crops per architecture."""

    image: str
    reference: list[Tile]
    rows: list[tuple[str, list[Tile]]]


def sheets_of(report: Report) -> Iterator[Sheet]:
    real, made, sampled = real_patches(report, PER_CLUSTER), distilled_by_label(report), sampled_images(report)
    sizes = report.clusters.sizes if report.clusters else ()
    for label in sorted({*real, *made})[:MAX_CLUSTERS]:
        yield Sheet(
            label=label,
            size=sizes[label] if 0 <= label < len(sizes) else None,
            real=[_thumb(decode_rgb(data, f"patch of cluster {label}"), "real patch", "") for data in real.get(label, [])],
            sampled=[
                _thumb(decode_rgb(sampled[image.path.name], image.path.name), "image as sampled", "")
                for image in made.get(label, [])[: 2 * PER_CLUSTER]
                if image.path.name in sampled
            ],
            distilled=[
                _thumb(read_rgb(image.path), "distilled image", _db(image.psnr_bic, "PSNR_bic "))
                for image in made.get(label, [])[: 2 * PER_CLUSTER]
            ],
        )


def distilled_by_label(report: Report) -> dict[int, list[DistilledImage]]:
    """Distilled images by pseudo-label; -1 for images without one."""
    made: dict[int, list[DistilledImage]] = {}
    for image in report.distilled.images if report.distilled else ():
        made.setdefault(-1 if image.pseudo_label is None else image.pseudo_label, []).append(image)
    return made


def _thumb(image: np.ndarray, caption: str, detail: str) -> Tile:
    return Tile(figures.thumbnail_uri(image), caption, detail, image)


def closeups_of(report: Report) -> Iterator[Closeup]:
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
                tile = _closeup_tile(read_rgb(own.sr), hr, report.label_of(result.record.source))
                rows.setdefault(result.record.arch, []).append(tile)
        reference = [Tile(figures.exact_uri(hr), "HR", "ground truth", hr)]
        reference.append(_closeup_tile(read_rgb(crop.bicubic), hr, "bicubic"))
        yield Closeup(crop.image, reference, list(rows.items()))


def _closeup_tile(image: np.ndarray, hr: np.ndarray, caption: str) -> Tile:
    return Tile(figures.exact_uri(image), caption, _db(figures.crop_psnr(image, hr)), image)


def _db(value: float | None, before: str = "") -> str:
    return "" if value is None else f"{before}{value:.2f} dB"


@dataclass(frozen=True)
class FlowStep:
    """A box of the flow chart, and the arrow after it.

    Attributes:
        title: what is done.
        section: of the paper.
        detail: its most important number.
        tiles: a few pictures.
        result: label of the arrow to the next box.
    """

    title: str
    section: str
    detail: str
    tiles: list[Tile]
    result: str


def flow_of(report: Report, sheets: list[Sheet]) -> list[FlowStep]:
    """The run in the form of the paper's Figure 2: the input and output of each part of the method."""
    patches, clusters, distilled, quality = report.patches, report.clusters, report.distilled, report.quality
    steps = []
    if patches:
        limit = f"PSNR_bic up to {patches.threshold_db:.1f} dB" if patches.threshold_db is not None else ""
        tiles = [sheet.real[0] for sheet in sheets if sheet.real][:FLOW_TILES]
        steps.append(FlowStep("Photos", "", f"{patches.photos:,}", [], f"{patches.total:,} windows"))
        steps.append(FlowStep("Keep hard patches", "II-A", limit, tiles, f"{patches.accepted:,} patches"))
    if clusters:
        steps.append(FlowStep("Cluster them", "II-A", "k-means on embeddings", [], f"{clusters.k} pseudo-labels"))
    if report.tuning:
        params = f", {report.tuning.params:,} parameters" if report.tuning.params else ""
        detail = f"{report.tuning.steps:,} steps{params}"
        made = f"{quality.candidates:,} candidates" if quality and quality.candidates else ""
        steps.append(FlowStep("Fine-tune the diffusion model", "II-B", detail, [], made))
    if distilled:
        detail = "select, restore detail" if report.run.restored else "select"
        tiles = [sheet.distilled[0] for sheet in sheets if sheet.distilled][:FLOW_TILES]
        made = f"{distilled.count:,} images of {distilled.height} px"
        steps.append(FlowStep("Sample the distilled set", "II-C", detail, tiles, made))
    if report.sr:
        sets, photos = len({r.record.source for r in report.sr}), max(r.test_images for r in report.sr)
        detail = f"{plural(len(report.sr), 'network')}, {plural(sets, 'training set')}"
        steps.append(FlowStep("Train SR networks", "III", detail, [], f"measured on {plural(photos, 'test photo')}"))
    return steps


@dataclass(frozen=True)
class Figure:
    """A number about the distilled set, what to compare it with, and how to read it."""

    name: str
    value: str
    reference: str
    reading: str


def figures_of(report: Report) -> list[Figure]:
    """How the distilled set compares with the accepted patches."""
    quality, distilled = report.quality, report.distilled
    if quality is None or distilled is None:
        return []
    restored = report.run.restored
    before = " Measured before detail restoration." if restored else ""
    sampled = f"; as sampled: {_db(quality.psnr_bic_sampled_mean)}" if restored and quality.psnr_bic_sampled_mean else ""
    rows = [
        Figure("PSNR_bic", _db(distilled.psnr_bic_mean), f"accepted patches: {_db(quality.psnr_bic_real_mean)}{sampled}",
               "A value close to that of the patches means the same amount of texture; a higher one, smoother images."),
        Figure("Distance in PSNR_bic", _db(quality.wasserstein_db), f"random choice: {_db(quality.wasserstein_db_random)}",
               f"Wasserstein distance between the distributions of PSNR_bic; 0 is best.{before}"),
        Figure("Coverage", _digits(quality.coverage), f"random choice: {_digits(quality.coverage_random)}",
               f"Mean similarity of each patch to its nearest distilled image; 1 is best.{before}"),
        Figure("Own-cluster share", _share(quality.own_cluster_share), "",
               f"Share of images whose nearest patch has the same pseudo-label. High: labels steer the sampling.{before}"),
        Figure("Precision", _share(quality.precision), "",
               f"Share of images that resemble real patches. Low: artifacts.{before}"),
        Figure("Recall", _share(quality.recall), "",
               f"Share of patches that resemble distilled images. Low: textures are missing.{before}"),
        Figure("Nearest to a patch", _digits(distilled.max_cosine_to_train), "a copy: 1",
               "Largest cosine between the pixels of an image and of a training patch."),
    ]  # fmt: skip
    return [row for row in rows if row.value]


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def finetune_charts(report: Report) -> list[tuple[str, str, str]]:
    """(name, what it measures, SVG) of each loss term that is not 0 throughout."""
    folder = report.run.path_of("finetune")
    curves = read_curves(folder / "curves.csv", "Fine-tuning") if folder else None
    result = []
    for term, values in curves.terms.items() if curves else ():
        if curves and term not in NOT_LOSSES and any(values):
            name, meaning = LOSSES.get(term, (term, ""))
            result.append((name, meaning, _line_chart({term: (curves, term)}, f"Fine-tuning: {name}", name)))
    return result


def sr_charts(report: Report) -> list[tuple[str, list[str], str]]:
    """(architecture, training sets in the order of their colors, SVG); the first seed of each training set."""
    by_arch: dict[str, dict[str, tuple[Curves, str]]] = {}
    for result in report.sr:
        folder, record = result.record.train_path, result.record
        curves = read_curves(folder / "curves.csv", record.source) if folder else None
        if curves is not None and "loss" in curves.terms:
            by_arch.setdefault(record.arch, {}).setdefault(report.label_of(record.source), (curves, "loss"))
    return [
        (arch, list(lines), _line_chart(lines, f"Training loss of {arch}", "L1 loss")) for arch, lines in by_arch.items()
    ]


def _line_chart(lines: Mapping[str, tuple[Curves, str]], title: str, y_label: str) -> str:
    series = {name: (np.array(c.steps), np.array(c.terms[term])) for name, (c, term) in lines.items()}
    return charts.line_chart(series, title=title, x_label="step", y_label=y_label, smooth=True)


def verdict_chart(judged: Verdict) -> str:
    """Differences in PSNR-Y to every other training set, with a dot per seed."""
    rows = [
        charts.Dots(
            f"{item.arch} vs {label_of(item.other, restored=False)}",
            item.difference.by_seed,
            item.difference.mean,
            item.difference.half_width,
            color_of(item.other),
        )
        for item in judged.comparisons
    ]
    title = "PSNR-Y of networks trained on the distilled set minus that of networks trained on other sets"
    label = "difference in PSNR-Y, dB (positive is better)"
    return charts.dot_plot(rows, title=title, x_label=label, line=0.0, line_label="equal")


def result_charts(report: Report) -> list[tuple[str, str]]:
    """(architecture, SVG): PSNR-Y by training set, with a dot per seed and a line for bicubic."""
    metric = METRICS["psnr_y"]
    bicubic = report.bicubic.get(metric.name) if report.bicubic else None
    by_arch: dict[str, dict[tuple[str, int | None], list[float]]] = {}
    for result in report.sr:
        value, record = result.metrics.get(metric.name), result.record
        if value is not None:
            by_arch.setdefault(record.arch, {}).setdefault((record.source, record.budget), []).append(value)
    if bicubic is None:
        return []
    return [(arch, _result_chart(report, arch, sets, bicubic)) for arch, sets in by_arch.items()]


def _result_chart(report: Report, arch: str, sets: Mapping[tuple[str, int | None], list[float]], bicubic: float) -> str:
    rows = [
        charts.Dots(report.label_of(source), own, sum(own) / len(own), None, color_of(source))
        for (source, _), own in sets.items()
    ]
    title, label = f"PSNR-Y of {arch} by training set", METRICS["psnr_y"].heading
    return charts.dot_plot(rows, title=title, x_label=label, line=bicubic, line_label="bicubic")
