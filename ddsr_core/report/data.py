"""What a report says, gathered from the artifacts of a run into frozen models; what a run lacks is None or empty."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ddsr_core.baselines.names import TrainingSetName
from ddsr_core.errors import InputError
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.image_sets import read_image_set

METRICS = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "lpips")
FULL, RANDOM, DISTILLED = "full", "random", "distilled"
#: Sources that are everything there is: they have no budget to be compared at.
WHOLE = (FULL, "full-thresholded")
_FIRST = (RANDOM, "threshold")
#: Rows of a table stand in this order: the baselines, ours, the whole sets. A source of none of these names is a baseline.
SOURCE_ORDER = (
    *_FIRST,
    *(name for name in get_args(TrainingSetName) if name not in (*_FIRST, DISTILLED, *WHOLE)),
    DISTILLED,
    *WHOLE,
)


class Frozen(BaseModel):
    """Base of the report's models."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StageRecord(Frozen):
    """One stage of a run: its artifact, how long it took, and whether it came from the store."""

    name: str
    key: str
    seconds: float = Field(ge=0)
    cached: bool
    path: Path
    counts: dict[str, Any] = {}


class SrRecord(Frozen):
    """One SR network that was trained and measured.

    ``source`` is one of `TrainingSetName` or another data source; ``budget`` is the number of training images
    (None: all). ``evaluate_path`` is an `evaluate` artifact, ``train_path`` a `train_sr` one.
    """

    arch: str
    source: str
    budget: int | None = None
    iterations: int
    seed: int
    params: int | None = None
    train_path: Path | None = None
    evaluate_path: Path | None = None


class RunRecord(Frozen):
    """A run as the report reads it; stages are found by name, so any of them may be missing."""

    name: str
    preset: str
    config: dict[str, Any] = {}
    stages: tuple[StageRecord, ...] = ()
    sr: tuple[SrRecord, ...] = ()
    bicubic_path: Path | None = None

    def path_of(self, stage: str) -> Path | None:
        """Artifact folder of the last stage with this name, or None."""
        return next((record.path for record in reversed(self.stages) if record.name == stage), None)


class Metrics(Frozen):
    """Means over the test images; None: not measured. PSNR in dB, SSIM up to 1, LPIPS from 0 (lower is better)."""

    psnr_y: float | None = None
    ssim_y: float | None = None
    psnr_rgb: float | None = None
    ssim_rgb: float | None = None
    lpips: float | None = None


class Patches(Frozen):
    """What the patches stage kept. ``covered_px``: pixels of the photos that lie in at least one window's grid."""

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
    """The distilled set; sizes in pixels, ``max_cosine_to_train`` of its image that is nearest to a patch."""

    count: int
    height: int
    width: int
    psnr_bic_mean: float | None
    max_cosine_to_train: float | None
    images: tuple[DistilledImage, ...]


class CropSet(Frozen):
    """Close-up of a test image: files of the HR and bicubic crops, and of the SR crop of this evaluation."""

    image: str
    hr: Path
    bicubic: Path
    sr: Path


class SrResult(Frozen):
    """An `SrRecord` with what was measured; ``images`` and ``hr_pixels`` count its training data."""

    record: SrRecord
    params: int | None
    images: int | None
    hr_pixels: int | None
    metrics: Metrics
    test_images: int
    crops: tuple[CropSet, ...]


class Curves(Frozen):
    """Columns of a ``curves.csv``: ``steps`` and one column a term."""

    title: str
    steps: tuple[float, ...]
    terms: dict[str, tuple[float, ...]]


class Report(Frozen):
    """Everything the report shows but pixels, which are read when drawn."""

    run: RunRecord
    patches: Patches | None
    clusters: Clusters | None
    distilled: Distilled | None
    sr: tuple[SrResult, ...]
    bicubic: Metrics | None

    @property
    def pixel_share(self) -> float | None:
        """Pixels of the distilled set as a share of those of the full set (else of the photos' windows), 0 … 1."""
        full = next((result.hr_pixels for result in self.sr if result.record.source == FULL), None)
        whole = full or (self.patches.covered_px if self.patches else 0)
        if not self.distilled or not whole:
            return None
        return self.distilled.count * self.distilled.height * self.distilled.width / whole

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
            "pixel_share": self.pixel_share,
            "sr": [
                result.record.model_dump(include={"arch", "source", "budget", "iterations", "seed"})
                | {"params": result.params, "metrics": result.metrics.model_dump()}
                for result in self.sr
            ],
            "bicubic": self.bicubic and self.bicubic.model_dump(),
        }


def gather(run: RunRecord) -> Report:
    """Read the summaries of a run's artifacts.

    Raises:
        InputError: an artifact that the record names lacks its files.
    """
    patches, clusters, sample = run.path_of("patches"), run.path_of("clusters"), run.path_of("sample")
    return Report(
        run=run,
        patches=_patches(patches) if patches else None,
        clusters=_clusters(clusters) if clusters else None,
        distilled=_distilled(sample) if sample else None,
        sr=tuple(sorted((_sr(record) for record in run.sr), key=_table_order)),
        bicubic=_metrics(_json(run.bicubic_path / "summary.json")) if run.bicubic_path else None,
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"not a readable summary: {error}", where=path, fix="run the stage again") from error
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
    """Sum over photos of the rectangle that its windows span: the photo but for a margin below one stride."""
    import pyarrow.parquet as pq

    table = pq.read_table(scores, columns=["photo", "y", "x"])
    spans = table.group_by("photo").aggregate([("y", "max"), ("x", "max")]).to_pylist()
    return sum((row["y_max"] + patch_px) * (row["x_max"] + patch_px) for row in spans)


def _clusters(folder: Path) -> Clusters:
    summary = _json(folder / "summary.json")
    return Clusters(k=summary["k"], sizes=tuple(summary["sizes"]), silhouette=summary.get("silhouette"))


def _distilled(folder: Path) -> Distilled:
    rows, summary = read_image_set(folder), _json(folder / "summary.json")
    if not rows:
        raise InputError("the distilled set is empty", where=folder, fix="run the sample stage again")
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


def _metrics(summary: dict[str, Any]) -> Metrics:
    values = summary["metrics"]
    return Metrics(**{name: values.get(name) for name in METRICS})


def _sr(record: SrRecord) -> SrResult:
    trained = _json(record.train_path / "summary.json") if record.train_path else {}
    facts = {"images": trained.get("images"), "hr_pixels": trained.get("hr_pixels")}
    params = trained.get("params") if record.params is None else record.params
    if record.evaluate_path is None:
        return SrResult(record=record, params=params, **facts, metrics=Metrics(), test_images=0, crops=())
    folder = record.evaluate_path
    summary = _json(folder / "summary.json")
    crops = (
        CropSet(image=crop["image"], **{kind: folder / crop[kind] for kind in ("hr", "bicubic", "sr")})
        for crop in summary.get("crops", [])
    )
    return SrResult(
        record=record,
        params=params,
        **facts,
        metrics=_metrics(summary),
        test_images=summary.get("images", 0),
        crops=tuple(crops),
    )


def source_rank(source: str) -> tuple[int, str]:
    """Place of a data source in a table."""
    behind_baselines = 2 * SOURCE_ORDER.index(DISTILLED) - 1
    return (2 * SOURCE_ORDER.index(source) if source in SOURCE_ORDER else behind_baselines), source


def _table_order(result: SrResult) -> tuple[str, tuple[int, str], int, int]:
    record = result.record
    return record.arch, source_rank(record.source), record.budget or 0, record.seed


def mean(values: list[float]) -> float | None:
    """Arithmetic mean, or None of nothing."""
    return math.fsum(values) / len(values) if values else None


def read_curves(path: Path, title: str) -> Curves | None:
    """Curves of a CSV file whose first column is ``step``; None where it is missing or has no row.

    Raises:
        InputError: not such a file.
    """
    if not path.is_file():
        return None
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        columns = {name: tuple(float(row[name]) for row in rows) for name in (rows[0] if rows else {})}
        return Curves(title=title, steps=columns.pop("step"), terms=columns) if columns else None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"not a table of curves: {error}", where=path, fix="run the stage again") from error


def psnr_bic_groups(report: Report) -> dict[str, np.ndarray]:
    """PSNR_bic (dB) of all windows, of the accepted ones and of the distilled images, as far as there are any."""
    groups: dict[str, np.ndarray] = {}
    folder = report.run.path_of("patches")
    if folder is not None:
        import pyarrow.parquet as pq

        table = pq.read_table(folder / "scores.parquet", columns=["psnr_bic", "accepted"])
        scores = table["psnr_bic"].to_numpy()
        groups = {"all windows": scores, "accepted": scores[table["accepted"].to_numpy(zero_copy_only=False)]}
    images = report.distilled.images if report.distilled else ()
    values = np.array([image.psnr_bic for image in images if image.psnr_bic is not None], np.float32)
    return {name: v[np.isfinite(v)] for name, v in {**groups, "distilled": values}.items() if np.isfinite(v).any()}


def real_patches(report: Report, per_cluster: int) -> dict[int, list[bytes]]:
    """PNG bytes of the patches nearest their centroid, by pseudo-label; different photos first."""
    patches, clusters = report.run.path_of("patches"), report.run.path_of("clusters")
    if patches is None or clusters is None:
        return {}
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

    chosen: dict[int, list[str]] = {}
    for row in _by_distance(pq.read_table(clusters / "labels.parquet").to_pylist()):
        members = chosen.setdefault(row["pseudo_label"], [])
        if len(members) < per_cluster:
            members.append(row["patch_id"])
    wanted = [patch_id for members in chosen.values() for patch_id in members]
    shards = ds.dataset(sorted(str(p) for p in patches.glob("patches-*.parquet")))
    found = shards.to_table(columns=["patch_id", "image"], filter=ds.field("patch_id").isin(wanted)).to_pylist()
    pixels = {row["patch_id"]: row["image"]["bytes"] for row in found}
    return {label: [pixels[i] for i in chosen[label] if i in pixels] for label in sorted(chosen)}


def _by_distance(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sorted so that each photo's nearest patch of a cluster comes before any photo's second."""
    seen: Counter[tuple[int, str]] = Counter()
    ranked = []
    for row in sorted(rows, key=lambda row: (row["distance"], row["patch_id"])):
        member = row["pseudo_label"], row["patch_id"].split("_")[0]
        ranked.append((seen[member], row))
        seen[member] += 1
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]
