"""The content of a report, read from the artifacts of a run into frozen models. Missing parts are None or empty."""

from __future__ import annotations

import csv
import json
import math
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pydantic import Field

from ddsr_core.baselines.names import TRAINING_SETS, TrainingSetName, label_of
from ddsr_core.errors import InputError
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.image_sets import read_image_set
from ddsr_core.metrics.spec import METRICS, MetricName
from ddsr_core.report.record import Frozen, RunRecord, SrRecord
from ddsr_core.sampling.config import SAMPLED

FULL: TrainingSetName = "full"
RANDOM: TrainingSetName = "random"
RESTORED_RANDOM: TrainingSetName = "random-restored"
DISTILLED: TrainingSetName = "distilled"
#: Training sets in the order of tables. Training sets of the user are listed with the baselines.
SOURCE_ORDER: tuple[str, ...] = tuple(TRAINING_SETS)
#: Means over the test images by metric; None: not measured. PSNR in dB, SSIM up to 1, LPIPS and DISTS from 0.
MetricMeans = Mapping[MetricName, float | None]


def means_of(values: Mapping[str, float | None]) -> MetricMeans:
    """The metrics of a summary in the order of tables: the default ones always, the others if they were measured."""
    return {name: values.get(name) for name, metric in METRICS.items() if metric.default or values.get(name) is not None}


class Patches(Frozen):
    """What the patches stage accepted. ``covered_px``: pixels of the photos that at least one window covers."""

    photos: int
    total: int
    accepted: int
    threshold_db: float | None
    skipped: dict[str, int]
    covered_px: int
    psnr_bic_mean: float | None
    skipped_files: tuple[tuple[str, str], ...]


class Clusters(Frozen):
    """Pseudo-labels 0 … k-1 and the number of patches in each."""

    k: int
    sizes: tuple[int, ...]
    silhouette: float | None = None


class DistilledImage(Frozen):
    """One image of the distilled set."""

    path: Path
    pseudo_label: int | None = None
    psnr_bic: float | None = None
    cosine: float | None = None


class Distilled(Frozen):
    """The distilled set. Sizes in pixels; ``max_cosine_to_train`` is the largest cosine similarity to an accepted patch."""

    count: int
    height: int
    width: int
    psnr_bic_mean: float | None
    max_cosine_to_train: float | None
    images: tuple[DistilledImage, ...]


class Quality(Frozen):
    """How the distilled set compares with the accepted patches; None: not computed.

    Attributes:
        candidates: images sampled, of which the set was selected.
        refused: candidates rejected as too similar to a training patch.
        coverage: mean cosine of each accepted patch to its nearest distilled image, by embedding.
        coverage_random: the same for candidates chosen at random.
        wasserstein_db: Wasserstein distance of the distributions of PSNR_bic, dB.
        wasserstein_db_random: the same for candidates chosen at random.
        psnr_bic_real_mean: mean PSNR_bic of the accepted patches, dB.
        psnr_bic_sampled_mean: mean PSNR_bic of the images as they were sampled, dB.
        own_cluster_share: share of images whose nearest accepted patch, by embedding, has their pseudo-label, 0 to 1.
        precision: share of images within the manifold of the accepted patches, 0 to 1 (Kynkaanniemi et al., 2019).
        recall: share of accepted patches within the manifold of the images, 0 to 1.

    Except for ``psnr_bic_real_mean``, all of them describe the images as they were sampled, before detail restoration.
    """

    candidates: int | None = None
    refused: int | None = None
    coverage: float | None = None
    coverage_random: float | None = None
    wasserstein_db: float | None = None
    wasserstein_db_random: float | None = None
    psnr_bic_real_mean: float | None = None
    psnr_bic_sampled_mean: float | None = None
    own_cluster_share: float | None = None
    precision: float | None = None
    recall: float | None = None


class Tuning(Frozen):
    """The fine-tuning of the diffusion model: optimizer steps and trained parameters."""

    steps: int
    params: int | None = None


class CropSet(Frozen):
    """Close-up of a test image: files of the HR and bicubic crops, and of the SR crop of this evaluation."""

    image: str
    hr: Path
    bicubic: Path
    sr: Path


class SrResult(Frozen):
    """An `SrRecord` with what was measured; ``images`` and ``hr_pixels`` count its training data.

    ``photo_psnr_y``: PSNR-Y in dB of each test photo, by its name; empty if it was not measured.
    """

    record: SrRecord
    params: int | None
    images: int | None
    hr_pixels: int | None
    metrics: MetricMeans
    test_images: int
    crops: tuple[CropSet, ...]
    photo_psnr_y: Mapping[str, float] = Field(default_factory=dict)


class Curves(Frozen):
    """Columns of a ``curves.csv``: ``steps`` and one column per term."""

    title: str
    steps: tuple[float, ...]
    terms: dict[str, tuple[float, ...]]


class Report(Frozen):
    """Everything that the report shows except pixels, which are read when the page is rendered."""

    run: RunRecord
    patches: Patches | None
    clusters: Clusters | None
    distilled: Distilled | None
    quality: Quality | None
    tuning: Tuning | None
    sr: tuple[SrResult, ...]
    bicubic: MetricMeans | None

    @property
    def pixel_share(self) -> float | None:
        """Pixels of the distilled set as a share of those of the full set (else of the photos' windows), 0 to 1."""
        full = next((result.hr_pixels for result in self.sr if result.record.source == FULL), None)
        available = full or (self.patches.covered_px if self.patches else 0)
        if not self.distilled or not available:
            return None
        return self.distilled.count * self.distilled.height * self.distilled.width / available

    def label_of(self, source: str) -> str:
        """What tables call a training set: `distilled` names its detail restoration where there is one."""
        return label_of(source, self.run.restored)

    def to_json(self) -> dict[str, Any]:
        """The content of ``report.json``."""
        run, patches, clusters, distilled = self.run, self.patches, self.clusters, self.distilled
        return {
            "name": run.name,
            "preset": run.preset,
            "config": run.config,
            "stages": [s.model_dump(include={"name", "key", "seconds", "cached", "counts"}) for s in run.stages],
            "patches": patches and patches.model_dump(exclude={"covered_px", "skipped_files"}),
            "clusters": clusters and clusters.model_dump(mode="json"),
            "distilled": distilled and distilled.model_dump(exclude={"images"}),
            "quality": self.quality and self.quality.model_dump(),
            "pixel_share": self.pixel_share,
            "sr": [
                result.record.model_dump(include={"arch", "source", "budget", "iterations", "seed"})
                | {"params": result.params, "metrics": dict(result.metrics)}
                for result in self.sr
            ],
            "bicubic": None if self.bicubic is None else dict(self.bicubic),
        }


def gather(run: RunRecord) -> Report:
    """Read the summaries of a run's artifacts.

    Raises:
        InputError: an artifact that the record names lacks its files.
    """
    patches, clusters, sample = run.path_of("patches"), run.path_of("clusters"), run.path_of("sample")
    finetune = run.path_of("finetune")
    return Report(
        run=run,
        patches=_patches(patches) if patches else None,
        clusters=_clusters(clusters) if clusters else None,
        distilled=_distilled(sample) if sample else None,
        quality=_quality(sample, clusters) if sample else None,
        tuning=_tuning(finetune) if finetune else None,
        sr=tuple(sorted((_sr(record) for record in run.sr), key=_table_order)),
        bicubic=means_of(_json(run.bicubic_path / "summary.json")["metrics"]) if run.bicubic_path else None,
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"not a readable summary: {error}", where=path, fix="Run the stage again.") from error
    return content


def _patches(folder: Path) -> Patches:
    summary = _json(folder / "summary.json")
    skipped = json.loads((folder / "skipped.json").read_bytes()) if (folder / "skipped.json").is_file() else []
    return Patches(
        photos=summary["photos"],
        total=summary["total"],
        accepted=summary["accepted"],
        threshold_db=summary.get("threshold_db"),
        skipped=summary.get("skipped", {}),
        covered_px=_covered_px(folder / "scores.parquet", int(summary["patch_px"])),
        psnr_bic_mean=summary.get("psnr_bic_mean"),
        skipped_files=tuple((item["file"], item["reason"]) for item in skipped),
    )


def _covered_px(scores: Path, patch_px: int) -> int:
    """Sum over photos of the rectangle that their windows span: the photo minus a margin of less than one stride."""
    table = pq.read_table(scores, columns=["photo", "y", "x"])
    spans = table.group_by("photo").aggregate([("y", "max"), ("x", "max")]).to_pylist()
    return sum((row["y_max"] + patch_px) * (row["x_max"] + patch_px) for row in spans)


def _clusters(folder: Path) -> Clusters:
    summary = _json(folder / "summary.json")
    return Clusters(k=summary["k"], sizes=tuple(summary["sizes"]), silhouette=summary.get("silhouette"))


def _distilled(folder: Path) -> Distilled:
    rows, summary = read_image_set(folder), _json(folder / "summary.json")
    if not rows:
        raise InputError("the distilled set is empty", where=folder, fix="Run the sample stage again.")
    images = tuple(
        DistilledImage(
            path=folder / row["file_name"],
            pseudo_label=row.get("pseudo_label"),
            psnr_bic=row.get("psnr_bic"),
            cosine=row.get("max_cosine_to_train"),
        )
        for row in rows
    )
    height, width = read_rgb(images[0].path).shape[:2]
    scores = [image.psnr_bic for image in images if image.psnr_bic is not None]
    cosines = [image.cosine for image in images if image.cosine is not None]
    return Distilled(
        count=len(images),
        height=height,
        width=width,
        psnr_bic_mean=summary.get("psnr_bic_mean", mean(scores)),
        max_cosine_to_train=summary.get("max_cosine_to_train", max(cosines, default=None)),
        images=images,
    )


def _quality(sample: Path, clusters: Path | None) -> Quality:
    summary = _json(sample / "summary.json")
    return Quality(
        own_cluster_share=summary.get("own_cluster_share", _own_cluster_share(sample, clusters) if clusters else None),
        wasserstein_db=summary.get("psnr_bic_wasserstein_db"),
        wasserstein_db_random=summary.get("psnr_bic_wasserstein_db_random"),
        **{
            name: summary.get(name)
            for name in (
                "candidates",
                "refused",
                "coverage",
                "coverage_random",
                "psnr_bic_real_mean",
                "psnr_bic_sampled_mean",
                "precision",
                "recall",
            )
        },
    )


def _own_cluster_share(sample: Path, clusters: Path) -> float | None:
    table = pq.read_table(clusters / "labels.parquet", columns=["patch_id", "pseudo_label"]).to_pydict()
    label_of = dict(zip(table["patch_id"], table["pseudo_label"], strict=True))
    rows = [row for row in read_image_set(sample) if row.get("nearest_patch_id_by_embedding") in label_of]
    return mean([float(label_of[row["nearest_patch_id_by_embedding"]] == row["pseudo_label"]) for row in rows])


def _tuning(folder: Path) -> Tuning | None:
    path = folder / "summary.json"
    if not path.is_file():
        return None
    summary = _json(path)
    return Tuning(steps=summary.get("steps", 0), params=summary.get("numbers"))


def _sr(record: SrRecord) -> SrResult:
    trained = _json(record.train_path / "summary.json") if record.train_path else {}
    training_data = {"images": trained.get("images"), "hr_pixels": trained.get("hr_pixels")}
    params = trained.get("params") if record.params is None else record.params
    if record.evaluate_path is None:
        return SrResult(record=record, params=params, **training_data, metrics=means_of({}), test_images=0, crops=())
    folder = record.evaluate_path
    summary = _json(folder / "summary.json")
    crops = (
        CropSet(image=crop["image"], **{kind: folder / crop[kind] for kind in ("hr", "bicubic", "sr")})
        for crop in summary.get("crops", [])
    )
    return SrResult(
        record=record,
        params=params,
        **training_data,
        metrics=means_of(summary["metrics"]),
        test_images=summary.get("images", 0),
        crops=tuple(crops),
        photo_psnr_y=_photo_psnr_y(folder / "per_image.parquet"),
    )


def _photo_psnr_y(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    rows = pq.read_table(path, columns=["image", "psnr_y"]).to_pylist()
    return {row["image"]: row["psnr_y"] for row in rows if row["psnr_y"] is not None and math.isfinite(row["psnr_y"])}


def source_rank(source: str) -> tuple[int, str]:
    """Position of a training set in a table; unknown ones come right before `distilled`."""
    behind_baselines = 2 * SOURCE_ORDER.index(DISTILLED) - 1
    return (2 * SOURCE_ORDER.index(source) if source in SOURCE_ORDER else behind_baselines), source


def _table_order(result: SrResult) -> tuple[str, tuple[int, str], int, int]:
    record = result.record
    return record.arch, source_rank(record.source), record.budget or 0, record.seed


def mean(values: list[float]) -> float | None:
    """Arithmetic mean, or None of nothing."""
    return math.fsum(values) / len(values) if values else None


def read_curves(path: Path, title: str) -> Curves | None:
    """Curves of a CSV file whose first column is ``step``; None if the file is missing or has no row.

    Raises:
        InputError: the file is not such a table.
    """
    if not path.is_file():
        return None
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        columns = {name: tuple(float(row[name]) for row in rows) for name in (rows[0] if rows else {})}
        return Curves(title=title, steps=columns.pop("step"), terms=columns) if columns else None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"not a table of curves: {error}", where=path, fix="Run the stage again.") from error


def psnr_bic_groups(report: Report) -> dict[str, np.ndarray]:
    """PSNR_bic (dB) of all windows, of the accepted ones and of the distilled images; groups without values are left out."""
    groups: dict[str, np.ndarray] = {}
    folder = report.run.path_of("patches")
    if folder is not None:
        table = pq.read_table(folder / "scores.parquet", columns=["psnr_bic", "accepted"])
        scores = table["psnr_bic"].to_numpy()
        groups = {"all windows": scores, "accepted": scores[table["accepted"].to_numpy(zero_copy_only=False)]}
    images = report.distilled.images if report.distilled else ()
    values = np.array([image.psnr_bic for image in images if image.psnr_bic is not None], np.float32)
    return {name: v[np.isfinite(v)] for name, v in {**groups, "distilled": values}.items() if np.isfinite(v).any()}


def real_patches(report: Report, per_cluster: int) -> dict[int, list[bytes]]:
    """PNG bytes of the patches nearest to their centroid, by pseudo-label; patches of different photos first."""
    patches, clusters = report.run.path_of("patches"), report.run.path_of("clusters")
    if patches is None or clusters is None:
        return {}
    chosen: dict[int, list[str]] = {}
    for row in _by_distance(pq.read_table(clusters / "labels.parquet").to_pylist()):
        members = chosen.setdefault(row["pseudo_label"], [])
        if len(members) < per_cluster:
            members.append(row["patch_id"])
    wanted = [patch_id for members in chosen.values() for patch_id in members]
    shards = ds.dataset(sorted(str(p) for p in patches.glob("patches-*.parquet")))
    rows = shards.to_table(columns=["patch_id", "image"], filter=ds.field("patch_id").isin(wanted)).to_pylist()
    pixels = {row["patch_id"]: row["image"]["bytes"] for row in rows}
    return {label: [pixels[i] for i in chosen[label] if i in pixels] for label in sorted(chosen)}


def sampled_images(report: Report) -> dict[str, bytes]:
    """PNG bytes of the distilled images before their detail was restored, by file name; none if it was not."""
    folder = report.run.path_of("sample")
    if folder is None or not (folder / SAMPLED).is_file():
        return {}
    with zipfile.ZipFile(folder / SAMPLED) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _by_distance(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sorted so that each photo's nearest patch of a cluster comes before any photo's second."""
    seen: Counter[tuple[int, str]] = Counter()
    ranked = []
    for row in sorted(rows, key=lambda row: (row["distance"], row["patch_id"])):
        member = row["pseudo_label"], row["patch_id"].split("_")[0]
        ranked.append((seen[member], row))
        seen[member] += 1
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]
