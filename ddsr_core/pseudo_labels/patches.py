"""Stage 1, patches: score every window of every photo by PSNR_bic and keep those below a threshold (paper, II-A).

One bicubic round trip a photo and an integral image of its squared error score all windows at once (the trick of
SamplingAug, BMVC 2021). Two passes: scores of all, then the accepted windows, cut and written as Parquet shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from ddsr_core.config import Runtime, StageConfig, digest_of
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.imaging.images import Photo, decode_rgb, encode_png, iter_photos, write_image_parquet
from ddsr_core.imaging.kernel import Kernel
from ddsr_core.imaging.round_trip import STRIP_PX, squared_error_sums
from ddsr_core.parallel import check_shared, in_parts, map_ahead
from ddsr_core.pseudo_labels.photo_cache import ScoreCache
from ddsr_core.storage.store import RESUME, Stage, StageResult, write_atomically, write_json, writing_atomically

if TYPE_CHECKING:
    import pyarrow as pa

PATCHES_PER_SHARD = 512
#: Rows of the table of scores that are texts at a time.
ROWS_AT_A_TIME = 65_536
#: Photos scored at a time, one a thread.
WORKERS = min(8, os.cpu_count() or 1)
#: Photos that are worth sending elsewhere.
PHOTOS_PER_PART = 64
#: Fields of the config that choose among the windows, and change no score.
RULES = {"threshold_db", "quantile"}


class PatchesConfig(StageConfig):
    """Which windows of the photos become training patches. Set either ``threshold_db`` or ``quantile``."""

    patch_px: int = Field(512, ge=16, le=4096, multiple_of=4, description="height and width of a patch, pixels")
    stride_px: int = Field(256, ge=4, multiple_of=4, description="distance of neighboring windows, pixels")
    flush_right: bool = Field(False, description="add a last row and column of windows that touch the far edges")
    kernel: Kernel = Field("matlab", description="bicubic kernel of PSNR_bic: matlab (antialiased) or opencv (as released)")
    threshold_db: float | None = Field(None, description="keep windows below this PSNR_bic, dB")
    quantile: float | None = Field(0.5, gt=0, le=1, description="keep this share of the windows, lowest PSNR_bic first")

    @model_validator(mode="after")
    def _one_rule(self) -> PatchesConfig:
        if (self.threshold_db is None) == (self.quantile is None):
            raise ValueError("set exactly one of threshold_db and quantile (the other to null)")
        return self


@dataclass(frozen=True)
class Windows:
    """Scores of one photo: ``psnr_bic`` float32, ``y`` and ``x`` int32, each ``(n,)``, row by row."""

    psnr_bic: np.ndarray
    y: np.ndarray
    x: np.ndarray


def offsets(side: int, patch_px: int, stride_px: int, flush: bool) -> np.ndarray:
    """Window positions along one side: the top-left grid, and with ``flush`` a last window at the far edge.

    >>> offsets(1000, 512, 256, flush=False).tolist(), offsets(1000, 512, 256, flush=True).tolist()
    ([0, 256], [0, 256, 488])
    """
    grid = np.arange(0, side - patch_px + 1, stride_px)
    last = (side - patch_px) // 4 * 4  # on the x4 lattice, so that LR and HR stay aligned
    return np.append(grid, last) if flush and grid[-1] < last else grid


def score_windows(image: np.ndarray, config: PatchesConfig) -> Windows:
    """PSNR_bic of all windows of a photo.

    The round trip is that of the whole photo, so the outermost pixels of a window inside it are resampled with their
    true neighbors, where a cut-out would be padded: its PSNR_bic
    differs by up to 0.25 dB where there is texture (64-px windows; less in larger ones), by more in smooth ones.

    Args:
        image: ``uint8 (H, W, 3)``, both sides at least ``patch_px``.
    """
    height, width = (side - side % 4 for side in image.shape[:2])
    size = config.patch_px
    ys = offsets(height, size, config.stride_px, config.flush_right)
    xs = offsets(width, size, config.stride_px, config.flush_right)
    cell = int(np.gcd.reduce([STRIP_PX, size, *ys, *xs]))  # every window is a rectangle of whole cells
    sums = squared_error_sums(image[:height, :width], config.kernel, cell)
    integral = np.pad(sums.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    below, above = integral[(ys + size) // cell], integral[ys // cell]
    left, right = xs // cell, (xs + size) // cell
    total = below[:, right] - below[:, left] - above[:, right] + above[:, left]
    psnr = -10 * np.log10(np.maximum(total, 0) / size**2 + 1e-12)
    y, x = np.meshgrid(ys, xs, indexing="ij")
    return Windows(psnr.ravel().astype(np.float32), y.ravel().astype(np.int32), x.ravel().astype(np.int32))


def run(config: PatchesConfig, *, photos: Path, out: Path, runtime: Runtime) -> StageResult:
    """Write the accepted patches, all scores and the skipped photos (layouts: ``docs/artifacts.md``).

    Raises:
        InputError: no photo can be used, or the threshold accepts nothing.
    """
    sources = list(iter_photos(photos))
    from_memo = _score_all(config, photos, sources, out, runtime)
    skipped, scores = _gather(config, sources, out)
    threshold = _threshold(config, scores["psnr_bic"], photos)
    accepted = scores["psnr_bic"] < threshold if config.quantile is None else scores["psnr_bic"] <= threshold
    if not accepted.any():
        low, middle = float(scores["psnr_bic"].min()), float(np.median(scores["psnr_bic"]))
        raise InputError(
            f"no window has a PSNR_bic below {threshold:.2f} dB (lowest {low:.2f}, median {middle:.2f})",
            where=photos,
            fix=f"set patches.threshold_db above {low:.2f}, or use patches.quantile",
        )
    _write_scores(out, sources, scores, accepted)
    _write_shards(config, sources, scores, accepted, out, runtime)
    kept = scores["psnr_bic"][accepted].astype(np.float64)
    reasons = Counter(item["reason"].split(":")[0] for item in skipped)
    counts: dict[str, Any] = {
        "photos": len(sources) - len(skipped), "total": len(accepted), "accepted": int(accepted.sum()),
        "threshold_db": round(float(threshold), 4), "skipped": dict(sorted(reasons.items())),
        "psnr_bic_mean": round(float(kept.mean()), 4), "kernel": config.kernel, "patch_px": config.patch_px,
        "median_psnr_bic": round(float(np.median(scores["psnr_bic"])), 4),
    }  # fmt: skip
    write_json(out / "skipped.json", skipped)
    write_json(out / "summary.json", counts)
    return StageResult({**counts, "from_memo": from_memo})


@dataclass(frozen=True)
class PhotosToScore:
    """A part of pass 1, for a process that shares the file system.

    Attributes:
        photos: the photo source; ``names``: of its photos in this part, by their numbers there.
        out: folder of the build.
    """

    config: PatchesConfig
    photos: Path
    names: dict[int, str]
    out: Path
    photo_cache: Path | None


def _score_all(config: PatchesConfig, photos: Path, sources: list[Photo], out: Path, runtime: Runtime) -> int:
    """Pass 1: one small file a photo in ``out/resume/scores``, with its scores or the reason why it was skipped.

    Returns:
        How many were known to the photo_cache.
    """
    from threadpoolctl import threadpool_limits

    folder = out / RESUME / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    todo = [index for index in range(len(sources)) if not _score_file(out, index).exists()]
    photo_cache = _memo(config, runtime.photo_cache)
    known, used = photo_cache.known(), set[str]()
    done = len(sources) - len(todo)
    with (
        runtime.progress("Scoring photos", total=len(sources), unit="photos", done=done) as bar,
        threadpool_limits(1, "blas"),  # a photo a thread: products that take all cores each would wait for one another
    ):
        for scored in _scored(config, photos, sources, todo, out, runtime, photo_cache):
            if runtime.photo_cache is not None:
                used |= _remember(photo_cache, known, scored, out)
            bar.advance(len(scored))
    if runtime.photo_cache is not None:
        photo_cache.finish({json.loads(_score_file(out, i).read_bytes())["digest"] for i in range(len(sources))} - {""})
    return len(used)


def _scored(
    config: PatchesConfig,
    photos: Path,
    sources: list[Photo],
    todo: list[int],
    out: Path,
    runtime: Runtime,
    photo_cache: ScoreCache,
) -> Iterator[Collection[int]]:
    """Score these photos, here or in parts elsewhere; yields the numbers of those whose files are there."""
    parts = in_parts(todo, PHOTOS_PER_PART)
    if runtime.spread is None or len(parts) < 2:
        yield from ([index] for index in _score(config, sources, todo, out, photo_cache))
        return
    work = [
        PhotosToScore(config, photos, {index: sources[index].name for index in part}, out, runtime.photo_cache)
        for part in parts
    ]
    for part, _ in zip(work, runtime.spread(score_part, work), strict=True):
        yield part.names


def score_part(part: PhotosToScore) -> None:
    """Score some photos into the folder of the build that they belong to.

    Raises:
        StorageError: that folder is not on this machine.
        InputError: the source has other photos here than where the build was begun.
    """
    from threadpoolctl import threadpool_limits

    check_shared(part.out)
    sources = list(iter_photos(part.photos))
    changed = [name for index, name in part.names.items() if index >= len(sources) or sources[index].name != name]
    if changed:
        raise InputError(f"photos have come or gone: {changed[0]}", where=part.photos, fix="run again")
    with threadpool_limits(1, "blas"):
        for _ in _score(part.config, sources, list(part.names), part.out, _memo(part.config, part.photo_cache)):
            pass


def _score(
    config: PatchesConfig, sources: list[Photo], numbers: list[int], out: Path, photo_cache: ScoreCache
) -> Iterator[int]:
    """Score photos on threads; yields the number of each when its file is there."""

    def score(index: int) -> tuple[int, bytes]:
        return index, _score_photo(config, sources[index], photo_cache)

    for index, data in map_ahead(score, numbers, WORKERS):
        write_atomically(_score_file(out, index), data)
        yield index


def _memo(config: PatchesConfig, folder: Path | None) -> ScoreCache:
    return ScoreCache(folder, digest_of([STAGE.version, config.model_dump(exclude=RULES)]))


def _remember(photo_cache: ScoreCache, known: Collection[str], numbers: Collection[int], out: Path) -> set[str]:
    """Take new scores into the photo_cache; by one thread, as equal photos under two names would be written at once.

    Returns:
        Digests of the photos that were known.
    """
    found = set()
    for index in numbers:
        scores = _score_file(out, index).read_bytes()
        digest = json.loads(scores)["digest"]
        if digest in known:
            found.add(digest)
        elif digest:
            photo_cache.put(digest, scores)
    return found


def _score_file(out: Path, index: int) -> Path:
    return out / RESUME / "scores" / f"{index:08d}.json"


def _score_photo(config: PatchesConfig, photo: Photo, photo_cache: ScoreCache) -> bytes:
    """JSON: ``digest``, ``reason`` (empty if used), and the fields of `Windows` (its floats come back exactly)."""
    digest, reason, windows = (
        "",
        "",
        Windows(*(np.empty(0, kind) for kind in (np.float32, np.int32, np.int32))),
    )
    try:
        data = photo.load()
        digest = hashlib.sha256(data).hexdigest()
        kept = photo_cache.get(digest)
        if kept is not None:
            return kept
        image = decode_rgb(data, photo.name)
        if min(image.shape[:2]) < config.patch_px:
            reason = f"too small: {image.shape[1]}x{image.shape[0]}"
        else:
            windows = score_windows(image, config)
    except InputError as error:
        reason = f"unreadable: {error.fix}" if error.what.startswith("not a readable") else error.what
    except OSError as error:
        reason = f"unreadable: {error.strerror}"
    columns = {name: getattr(windows, name).tolist() for name in ("psnr_bic", "y", "x")}
    return json.dumps({"digest": digest, "reason": reason, **columns}, allow_nan=False).encode()


def _gather(config: PatchesConfig, sources: list[Photo], out: Path) -> tuple[list[dict[str, str]], dict[str, np.ndarray]]:
    """The skipped photos with reasons, and the scores of the others as columns (``photo`` is an index)."""
    skipped: list[dict[str, str]] = []
    first_with: dict[str, str] = {}
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("photo", "y", "x", "psnr_bic", "digest")}
    for index, photo in enumerate(sources):
        stored = json.loads(_score_file(out, index).read_bytes())
        digest, reason = stored["digest"], stored["reason"]
        if not reason and digest in first_with:
            reason = f"duplicate: same content as {first_with[digest]}"
        if reason:
            skipped.append({"file": photo.name, "reason": reason})
            continue
        first_with[digest] = photo.name
        count = len(stored["psnr_bic"])
        columns["photo"].append(np.full(count, index, np.int32))
        columns["digest"].append(np.full(count, digest, object))  # one text a photo
        columns["psnr_bic"].append(np.array(stored["psnr_bic"], np.float32))
        for name in ("y", "x"):
            columns[name].append(np.array(stored[name], np.int32))
    if not first_with:
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(s["reason"].split(":")[0] for s in skipped).items())
        raise InputError(
            f"none of {len(sources)} images can be used ({reasons}); "
            f"for example {skipped[0]['file']}: {skipped[0]['reason']}",
            fix=f"bring images of at least {config.patch_px}x{config.patch_px}, or lower patches.patch_px",
        )
    return skipped, {name: np.concatenate(parts) for name, parts in columns.items()}


def _threshold(config: PatchesConfig, psnr: np.ndarray, photos: Path) -> float:
    if config.threshold_db is not None:
        return config.threshold_db
    if config.quantile is None:
        raise ConfigError("neither threshold_db nor quantile is set", where=photos)
    # A value that occurs, so that exactly the lowest ones pass, whatever the platform's interpolation.
    return float(np.quantile(psnr, config.quantile, method="lower"))


def _window_fields() -> dict[str, pa.DataType]:
    import pyarrow as pa

    return {
        "patch_id": pa.string(), "photo": pa.string(), "photo_digest": pa.string(),
        "y": pa.int32(), "x": pa.int32(), "psnr_bic": pa.float32(),
    }  # fmt: skip


def _write_scores(out: Path, sources: list[Photo], scores: dict[str, np.ndarray], accepted: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([*_window_fields().items(), ("accepted", pa.bool_())])
    with writing_atomically(out / "scores.parquet") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for start in range(0, len(accepted), ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            table = {
                "patch_id": [_patch_id(scores, row) for row in range(*rows.indices(len(accepted)))],
                "photo": [sources[index].name for index in scores["photo"][rows]],
                "photo_digest": scores["digest"][rows].tolist(),
                "y": scores["y"][rows],
                "x": scores["x"][rows],
                "psnr_bic": scores["psnr_bic"][rows],
                "accepted": accepted[rows],
            }
            writer.write_table(pa.table(table, schema=schema))


def _patch_id(scores: dict[str, np.ndarray], row: int) -> str:
    return f"{scores['digest'][row][:16]}_{scores['y'][row]}_{scores['x'][row]}"


def _write_shards(
    config: PatchesConfig,
    sources: list[Photo],
    scores: dict[str, np.ndarray],
    accepted: np.ndarray,
    out: Path,
    runtime: Runtime,
) -> None:
    """Pass 2: cut the accepted windows, a shard at a time; shards that are there already are not cut again."""
    fields = _window_fields()
    rows = np.flatnonzero(accepted)
    starts = range(0, len(rows), PATCHES_PER_SHARD)
    todo = [start for start in starts if not _shard(out, start).exists()]

    def cut(taken: np.ndarray) -> list[dict[str, Any]]:
        return _records(config, sources[scores["photo"][taken[0]]], scores, taken)

    with runtime.progress("Cutting patches", total=len(starts), unit="shards", done=len(starts) - len(todo)) as bar:
        for start in todo:
            shard = rows[start : start + PATCHES_PER_SHARD]
            by_photo = np.split(shard, np.flatnonzero(np.diff(scores["photo"][shard])) + 1)
            records = (record for of_photo in map_ahead(cut, by_photo, WORKERS) for record in of_photo)
            write_image_parquet(_shard(out, start), records, fields)
            bar.advance()


def _records(config: PatchesConfig, photo: Photo, scores: dict[str, np.ndarray], rows: np.ndarray) -> list[dict[str, Any]]:
    """The Parquet rows of some windows of one photo."""
    image = photo.read()
    records = []
    for row in rows:
        y, x = int(scores["y"][row]), int(scores["x"][row])
        name = _patch_id(scores, row)
        # Level 6 would be 8 percent smaller and take five times as long, more than all the scoring.
        png = encode_png(np.ascontiguousarray(image[y : y + config.patch_px, x : x + config.patch_px]), level=1)
        records.append(
            {
                "image": {"bytes": png, "path": f"{name}.png"},
                "patch_id": name,
                "photo": photo.name,
                "photo_digest": str(scores["digest"][row]),
                "y": y,
                "x": x,
                "psnr_bic": float(scores["psnr_bic"][row]),
            }
        )
    return records


def _shard(out: Path, start: int) -> Path:
    return out / f"patches-{start // PATCHES_PER_SHARD:05d}.parquet"


def read_summary(folder: Path) -> dict[str, Any]:
    """``summary.json`` of a patches artifact."""
    return dict(json.loads((folder / "summary.json").read_text()))


STAGE = Stage("patches", version=2, run=run, config=PatchesConfig, section="II-A", photo_cache=True)
