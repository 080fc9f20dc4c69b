"""Stage 1, patches: score every window of every photo by PSNR_bic and keep those below a threshold (paper, II-A).

Pass 1 scores all photos (`ddsr_core.pseudo_labels.scoring`). Pass 2 cuts the accepted windows and writes them to Parquet
files. The files are described in ``docs/artifacts.md``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddsr_core.config import Runtime
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.imaging.decode import decode_rgb, picture_memory
from ddsr_core.imaging.image_sets import write_image_parquet
from ddsr_core.imaging.images import encode_png
from ddsr_core.imaging.photos import Photo, iter_photos
from ddsr_core.parallel import prefetch
from ddsr_core.pseudo_labels.config import PatchesConfig
from ddsr_core.pseudo_labels.scoring import WORKERS, Scores, gather_scores, score_photos
from ddsr_core.storage.files import write_json, writing_atomically
from ddsr_core.storage.stage import Stage, StageResult

PATCHES_PER_FILE = 512
#: Rows of the table of scores that are converted to Python strings at once.
ROWS_AT_A_TIME = 65_536
#: Higher levels make files 8 % smaller and take five times as long, longer than scoring all windows.
PNG_LEVEL = 1
WINDOW_FIELDS: Mapping[str, pa.DataType] = {
    "patch_id": pa.string(),
    "photo": pa.string(),
    "photo_digest": pa.string(),
    "y": pa.int32(),
    "x": pa.int32(),
    "psnr_bic": pa.float32(),
}


def run(config: PatchesConfig, *, photos: Path, out: Path, runtime: Runtime) -> StageResult:
    """Write the accepted patches, the scores of all windows, and the skipped photos.

    Raises:
        InputError: no photo can be used, or no window is accepted.
    """
    sources = list(iter_photos(photos))
    from_photo_cache = score_photos(config, photos, sources, out, runtime)
    scores = gather_scores(config, sources, out)
    threshold = _threshold(config, scores.psnr_bic, photos)
    accepted = scores.psnr_bic < threshold if config.quantile is None else scores.psnr_bic <= threshold
    if not accepted.any():
        raise _nothing_accepted(threshold, scores, photos)
    _write_scores(out, sources, scores, accepted)
    _write_patches(config, sources, scores, np.flatnonzero(accepted), out, runtime)
    counts = _counts(config, len(sources), scores, accepted, threshold)
    write_json(out / "skipped.json", scores.skipped)
    write_json(out / "summary.json", counts)
    return StageResult({**counts, "from_photo_cache": from_photo_cache}, inputs={"photos": scores.source})


def _threshold(config: PatchesConfig, psnr: np.ndarray, photos: Path) -> float:
    """The highest PSNR_bic, dB, of an accepted window (quantile), or the lowest of a rejected one (threshold_db)."""
    if config.threshold_db is not None:
        return config.threshold_db
    if config.quantile is None:
        raise ConfigError("neither threshold_db nor quantile is set", where=photos)
    # A value that occurs: interpolation between two values differs between platforms in the last bits.
    return float(np.quantile(psnr, config.quantile, method="lower"))


def _nothing_accepted(threshold: float, scores: Scores, photos: Path) -> InputError:
    lowest, median = float(scores.psnr_bic.min()), float(np.median(scores.psnr_bic))
    return InputError(
        f"no window has a PSNR_bic below {threshold:.2f} dB (lowest {lowest:.2f}, median {median:.2f})",
        where=photos,
        fix=f"set patches.threshold_db above {lowest:.2f}, or use patches.quantile",
    )


def _counts(config: PatchesConfig, photos: int, scores: Scores, accepted: np.ndarray, threshold: float) -> dict[str, Any]:
    reasons = Counter(item["reason"].split(":")[0] for item in scores.skipped)
    return {
        "photos": photos - len(scores.skipped),
        "total": len(accepted),
        "accepted": int(accepted.sum()),
        "threshold_db": round(float(threshold), 4),
        "skipped": dict(sorted(reasons.items())),
        "psnr_bic_mean": round(float(scores.psnr_bic[accepted].astype(np.float64).mean()), 4),
        "kernel": config.kernel,
        "patch_px": config.patch_px,
        "median_psnr_bic": round(float(np.median(scores.psnr_bic)), 4),
    }


def _write_scores(out: Path, sources: Sequence[Photo], scores: Scores, accepted: np.ndarray) -> None:
    schema = pa.schema([*WINDOW_FIELDS.items(), ("accepted", pa.bool_())])
    with writing_atomically(out / "scores.parquet") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for start in range(0, len(accepted), ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            table = {
                "patch_id": [scores.patch_id(row) for row in range(*rows.indices(len(accepted)))],
                "photo": [sources[index].name for index in scores.photo[rows]],
                "photo_digest": scores.digest[rows].tolist(),
                "y": scores.y[rows],
                "x": scores.x[rows],
                "psnr_bic": scores.psnr_bic[rows],
                "accepted": accepted[rows],
            }
            writer.write_table(pa.table(table, schema=schema))


def _write_patches(
    config: PatchesConfig, sources: Sequence[Photo], scores: Scores, rows: np.ndarray, out: Path, runtime: Runtime
) -> None:
    """Pass 2: cut the accepted windows, one file after the other. Files of an interrupted build are not cut again."""
    starts = range(0, len(rows), PATCHES_PER_FILE)
    todo = [start for start in starts if not _patches_file(out, start).exists()]

    def cut(of_photo: np.ndarray) -> list[dict[str, Any]]:
        return list(_records(config, sources[scores.photo[of_photo[0]]], scores, of_photo))

    with runtime.progress("Cutting patches", total=len(starts), unit="files", done=len(starts) - len(todo)) as bar:
        for start in todo:
            of_file = rows[start : start + PATCHES_PER_FILE]
            by_photo = np.split(of_file, np.flatnonzero(np.diff(scores.photo[of_file])) + 1)
            records = (record for of_photo in prefetch(cut, by_photo, WORKERS) for record in of_photo)
            write_image_parquet(_patches_file(out, start), records, WINDOW_FIELDS)
            bar.advance()


def _records(config: PatchesConfig, photo: Photo, scores: Scores, rows: np.ndarray) -> Iterator[dict[str, Any]]:
    """The Parquet rows of some windows of one photo.

    Raises:
        ChangedInputError: the photo is not the one that was scored.
    """
    data = photo.content_unchanged(str(scores.digest[rows[0]]))
    with picture_memory(data):
        yield from _cut(config, photo.name, decode_rgb(data, photo.name), scores, rows)


def _cut(config: PatchesConfig, photo: str, image: np.ndarray, scores: Scores, rows: np.ndarray) -> Iterator[dict[str, Any]]:
    for row in rows:
        y, x = int(scores.y[row]), int(scores.x[row])
        name = scores.patch_id(row)
        png = encode_png(np.ascontiguousarray(image[y : y + config.patch_px, x : x + config.patch_px]), level=PNG_LEVEL)
        yield {
            "image": {"bytes": png, "path": f"{name}.png"},
            "patch_id": name,
            "photo": photo,
            "photo_digest": str(scores.digest[row]),
            "y": y,
            "x": x,
            "psnr_bic": float(scores.psnr_bic[row]),
        }


def _patches_file(out: Path, start: int) -> Path:
    return out / f"patches-{start // PATCHES_PER_FILE:05d}.parquet"


def read_summary(folder: Path) -> dict[str, Any]:
    """``summary.json`` of a patches artifact."""
    return dict(json.loads((folder / "summary.json").read_text()))


STAGE = Stage(
    "patches",
    version=2,
    run=run,
    config=PatchesConfig,
    section="II-A",
    photo_cache=True,
    words="{accepted:,} patches of {patch_px} px from {photos:,} photos",
)
