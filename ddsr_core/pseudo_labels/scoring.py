"""Pass 1 of the patches stage: score every photo, on threads or in parts in other processes.

Each photo leaves one small file in ``out/resume/scores``, so that an interrupted build scores no photo twice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from ddsr_core.config import Runtime, digest_of
from ddsr_core.errors import InputError
from ddsr_core.imaging.decode import UnusableImage, decode_rgb, picture_memory
from ddsr_core.imaging.photos import UNREADABLE, Photo, iter_photos, source_digest
from ddsr_core.parallel import check_shared, in_parts, prefetch
from ddsr_core.pseudo_labels.config import PatchesConfig
from ddsr_core.pseudo_labels.photo_cache import ScoreCache
from ddsr_core.pseudo_labels.windows import Windows, score_windows
from ddsr_core.storage.files import write_atomically
from ddsr_core.storage.stage import RESUME

#: Raise it whenever `score_windows` gives other values for the same photo and config.
SCORES_VERSION = 1
#: Photos scored at once, one per thread.
WORKERS = min(8, os.cpu_count() or 1)
#: Photos in a part, at least: a smaller part costs more to start than it saves.
PHOTOS_PER_PART = 64
#: Fields of the config that select windows and change no score.
SELECTION_FIELDS = {"threshold_db", "quantile"}


@dataclass(frozen=True)
class ScoredPhoto:
    """The result for one photo.

    Attributes:
        digest: SHA-256 of the file, empty if it could not be read.
        reason: why the photo is skipped, empty if it is used.
        windows: none for a skipped photo.
    """

    digest: str
    reason: str
    windows: Windows

    def to_json(self) -> bytes:
        """JSON from which the same float32 values are read back."""
        columns = {name: getattr(self.windows, name).tolist() for name in ("psnr_bic", "y", "x")}
        return json.dumps({"digest": self.digest, "reason": self.reason, **columns}, allow_nan=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> ScoredPhoto:
        stored = json.loads(data)
        windows = Windows(
            np.array(stored["psnr_bic"], np.float32), np.array(stored["y"], np.int32), np.array(stored["x"], np.int32)
        )
        return cls(stored["digest"], stored["reason"], windows)


@dataclass(frozen=True)
class Scores:
    """The windows of all photos that are used, ``(n,)`` each, and the photos that are skipped.

    Attributes:
        photo: ``int32``, index of the photo in its source.
        digest: SHA-256 of the photo's file.
        y: ``int32``, top edge in pixels.
        x: ``int32``, left edge in pixels.
        psnr_bic: ``float32``, dB.
        skipped: ``file`` and ``reason`` of each skipped photo.
        source: digest of the photo source as it was read.
    """

    photo: np.ndarray
    digest: np.ndarray
    y: np.ndarray
    x: np.ndarray
    psnr_bic: np.ndarray
    skipped: list[dict[str, str]]
    source: str

    def patch_id(self, row: int) -> str:
        """The id of a window: the beginning of its photo's digest, and its position."""
        return f"{self.digest[row][:16]}_{self.y[row]}_{self.x[row]}"


@dataclass(frozen=True)
class PhotosToScore:
    """A part of the work, for a process that shares the file system.

    Attributes:
        photos: the photo source.
        names: names of the photos of this part, by their index in the source.
        out: folder of the build.
    """

    config: PatchesConfig
    photos: Path
    names: dict[int, str]
    out: Path
    photo_cache: Path | None


def score_photos(config: PatchesConfig, photos: Path, sources: Sequence[Photo], out: Path, runtime: Runtime) -> int:
    """Score all photos into the folder of the build.

    Args:
        photos: the photo source.
        sources: its photos.

    Returns:
        How many photos were in the photo cache.
    """
    (out / RESUME / "scores").mkdir(parents=True, exist_ok=True)
    todo = [index for index in range(len(sources)) if not _score_file(out, index).exists()]
    job = PhotosToScore(config, photos, {i: sources[i].name for i in todo}, out, runtime.photo_cache)
    cache = _score_cache(config, runtime.photo_cache)
    known, used = cache.known(), set[str]()
    done = len(sources) - len(todo)
    with runtime.progress("Scoring photos", total=len(sources), unit="photos", done=done) as bar:
        for indices in _scored(job, sources, cache, runtime):
            if runtime.photo_cache is not None:
                used |= _add_to_cache(cache, known, indices, out)
            bar.advance(len(indices))
    if runtime.photo_cache is not None:
        cache.finish({_read_scores(out, index).digest for index in range(len(sources))} - {""})
    return len(used)


def score_part(part: PhotosToScore) -> None:
    """Score some photos into the folder of the build that they belong to.

    Raises:
        StorageError: that folder is not on this machine.
        InputError: the photo source differs from what it was when the build began.
    """
    check_shared(part.out)
    sources = list(iter_photos(part.photos))
    changed = [name for index, name in part.names.items() if index >= len(sources) or sources[index].name != name]
    if changed:
        raise InputError(f"photos were added or removed: {changed[0]}", where=part.photos, fix="run again")
    for _ in _score(part, sources, _score_cache(part.config, part.photo_cache)):
        pass


def gather_scores(config: PatchesConfig, sources: Sequence[Photo], out: Path) -> Scores:
    """Read the scores of all photos. Of photos with equal content, the first is used.

    Raises:
        InputError: no photo can be used.
    """
    skipped: list[dict[str, str]] = []
    entries: list[tuple[str, str]] = []
    first_with: dict[str, str] = {}
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("photo", "digest", "y", "x", "psnr_bic")}
    for index, photo in enumerate(sources):
        scored = _read_scores(out, index)
        reason = scored.reason
        entries.append((photo.name, scored.digest or f"{UNREADABLE}{reason}"))
        if not reason and scored.digest in first_with:
            reason = f"duplicate: same content as {first_with[scored.digest]}"
        if reason:
            skipped.append({"file": photo.name, "reason": reason})
            continue
        first_with[scored.digest] = photo.name
        count = len(scored.windows.psnr_bic)
        columns["photo"].append(np.full(count, index, np.int32))
        columns["digest"].append(np.full(count, scored.digest, object))  # one string object per photo
        for name in ("y", "x", "psnr_bic"):
            columns[name].append(getattr(scored.windows, name))
    if not first_with:
        counts = Counter(item["reason"].split(":")[0] for item in skipped)
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        raise InputError(
            f"none of {len(sources)} images can be used ({reasons}); "
            f"for example {skipped[0]['file']}: {skipped[0]['reason']}",
            fix=f"use images of at least {config.patch_px}x{config.patch_px} px, or lower patches.patch_px",
        )
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Scores(**joined, skipped=skipped, source=source_digest(entries))


def _scored(job: PhotosToScore, sources: Sequence[Photo], cache: ScoreCache, runtime: Runtime) -> Iterator[Collection[int]]:
    """Score the photos here or in parts elsewhere; yields the indices of photos whose files are written."""
    parts = [
        PhotosToScore(job.config, job.photos, {i: job.names[i] for i in indices}, job.out, job.photo_cache)
        for indices in in_parts(list(job.names), PHOTOS_PER_PART)
    ]
    if runtime.run_parts is None or len(parts) < 2:
        yield from ([index] for index in _score(job, sources, cache))
        return
    for part, _ in zip(parts, runtime.run_parts(score_part, parts), strict=True):
        yield part.names


def _score(part: PhotosToScore, sources: Sequence[Photo], cache: ScoreCache) -> Iterator[int]:
    """Score photos on threads; yields the index of each when its file is written."""

    def score(index: int) -> tuple[int, bytes]:
        return index, _score_photo(part.config, sources[index], cache)

    # One photo per thread: matrix products that use all cores themselves would wait for one another.
    with threadpool_limits(1, "blas"):
        for index, data in prefetch(score, part.names, WORKERS):
            write_atomically(_score_file(part.out, index), data)
            yield index


def _score_photo(config: PatchesConfig, photo: Photo, cache: ScoreCache) -> bytes:
    """`ScoredPhoto` as JSON."""
    digest, reason = "", ""
    windows = Windows(*(np.empty(0, kind) for kind in (np.float32, np.int32, np.int32)))
    try:
        data = photo.content()
        digest = hashlib.sha256(data).hexdigest()
        cached = cache.get(digest)
        if cached is not None:
            return cached
        with picture_memory(data):
            image = decode_rgb(data, photo.name)
            if min(side - side % config.scale for side in image.shape[:2]) < config.patch_px:
                reason = f"too small: {image.shape[1]}x{image.shape[0]}"
            else:
                windows = score_windows(image, config)
    except UnusableImage as error:
        reason = error.reason
    return ScoredPhoto(digest, reason, windows).to_json()


def _score_cache(config: PatchesConfig, folder: Path | None) -> ScoreCache:
    scoring = {name: value for name, value in config.canonical().items() if name not in SELECTION_FIELDS}
    return ScoreCache(folder, digest_of([SCORES_VERSION, scoring]))


def _add_to_cache(cache: ScoreCache, known: Collection[str], indices: Collection[int], out: Path) -> set[str]:
    """Add new scores to the photo cache, in one thread: two threads could write photos with equal content at once.

    Returns:
        Digests of the photos that were in the cache.
    """
    hits = set()
    for index in indices:
        data = _score_file(out, index).read_bytes()
        digest = ScoredPhoto.from_json(data).digest
        if digest in known and cache.get(digest) is not None:
            hits.add(digest)
        elif digest:
            cache.put(digest, data)
    return hits


def _score_file(out: Path, index: int) -> Path:
    return out / RESUME / "scores" / f"{index:08d}.json"


def _read_scores(out: Path, index: int) -> ScoredPhoto:
    return ScoredPhoto.from_json(_score_file(out, index).read_bytes())
