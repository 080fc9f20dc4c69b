"""Stage `crops`: real crops, as many as there are distilled images (Table III of the paper).

*Random crops* are cut anywhere from all photos. *Threshold crops* are taken from the patches that passed the PSNR_bic
threshold. The training set *full* needs no stage: it is the photo folder itself.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ddsr_core.baselines.config import CropsConfig
from ddsr_core.config import Runtime
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.imaging.bicubic import psnr_bic
from ddsr_core.imaging.decode import UnusableImage, decode_rgb
from ddsr_core.imaging.image_sets import finish_image_set, image_set_name, read_image_parquet
from ddsr_core.imaging.images import save_png, to_float
from ddsr_core.imaging.photos import iter_photos, source_digest
from ddsr_core.sr.data import count_images
from ddsr_core.storage.files import write_atomically, write_json
from ddsr_core.storage.stage import RESUME, Stage, StageResult

Row = dict[str, Any]


def run(
    config: CropsConfig, *, out: Path, runtime: Runtime, photos: Path | None = None, patches: Path | None = None
) -> StageResult:
    """Write an image set of crops with ``photo``, ``y``, ``x`` and ``psnr_bic`` (dB) of each.

    Args:
        config: kind, number and size.
        out: output folder.
        runtime: progress.
        photos: photo source, for ``random``.
        patches: patches artifact, for ``threshold``.

    Raises:
        ConfigError: the input that the kind needs is missing, or the patches have another size.
        InputError: no photo is large enough, or there are no patches.
    """
    if config.kind == "random":
        rows, statistics = _random_crops(config, _needed(photos, "photos", config), out, runtime)
    else:
        rows, statistics = _threshold_crops(config, _needed(patches, "patches", config), out, runtime)
    fields = {"photo": pa.string(), "y": pa.int32(), "x": pa.int32(), "psnr_bic": pa.float32()}
    finish_image_set(out, rows, fields)
    counts = {
        "kind": config.kind,
        "count": len(rows),
        "patch_px": config.patch_px,
        "psnr_bic_mean": round(float(np.mean([row["psnr_bic"] for row in rows])), 4),
        **statistics,
    }
    write_json(out / "summary.json", counts)
    return StageResult(counts=counts, inputs={"photos": _measured(out)["source"]} if config.kind == "random" else {})


def draw_crop(sizes: np.ndarray, patch_px: int, seed: int, index: int) -> tuple[int, int, int]:
    """Sample photo, y and x of crop ``index``: a photo in proportion to its area, then a corner uniformly.

    Args:
        sizes: (n, 2) heights and widths. Photos smaller than ``patch_px`` are never sampled.
        patch_px: height and width of the crop.
        seed, index: the result depends on these alone.
    """
    generator = np.random.default_rng([seed, index])
    areas = np.where(sizes.min(axis=1) >= patch_px, sizes.prod(axis=1), 0).cumsum()
    photo = int(np.searchsorted(areas, generator.integers(areas[-1]), side="right"))
    y, x = (int(generator.integers(side - patch_px + 1)) for side in sizes[photo])
    return photo, y, x


def draw_patches(available: int, count: int, seed: int) -> list[int]:
    """Sample ``count`` of ``available`` patches uniformly. None is repeated before all have been taken once."""
    generator = np.random.default_rng(seed)
    rounds = -(-count // available)
    return [int(i) for _ in range(rounds) for i in generator.permutation(available)][:count]


def _random_crops(config: CropsConfig, photos: Path, out: Path, runtime: Runtime) -> tuple[list[Row], dict[str, Any]]:
    _measure(photos, out, runtime)
    measured = _measured(out)
    sizes = np.array(measured["sizes"], np.int64).reshape(-1, 2)
    if not len(sizes) or sizes.min(axis=1).max() < config.patch_px:
        raise InputError(
            f"no photo is as large as a crop of {config.patch_px} px",
            where=photos,
            fix="use larger photos or lower patch_px",
        )
    crops: dict[int, list[tuple[int, int, int]]] = defaultdict(list)  # photo -> (index, y, x)
    for index in range(config.count):
        number, y, x = draw_crop(sizes, config.patch_px, config.seed, index)
        crops[number].append((index, y, x))
    rows: dict[int, Row] = {}
    with runtime.progress("Cutting random crops", total=config.count, unit="images") as bar:
        for number, photo in enumerate(iter_photos(photos)):
            if number not in crops:
                continue
            pixels = decode_rgb(photo.content_unchanged(measured["digests"][number]), photo.name)
            for index, y, x in crops[number]:
                crop = pixels[y : y + config.patch_px, x : x + config.patch_px]
                save_png(out / image_set_name(index), crop)
                rows[index] = {"photo": photo.name, "y": y, "x": x, "psnr_bic": _psnr_bic(crop, config)}
                bar.advance()
    return [rows[index] for index in range(config.count)], {"photos": len(crops), "skipped": measured["skipped"]}


def _measure(photos: Path, out: Path, runtime: Runtime) -> None:
    """Write size and digest of every photo; the size of one that cannot be read is 0 x 0."""
    if (out / RESUME / "sizes.json").exists():
        return
    sizes: list[tuple[int, int]] = []
    entries: list[tuple[str, str]] = []
    skipped: Counter[str] = Counter()
    with runtime.progress("Measuring photos", total=count_images(photos), unit="photos") as bar:
        for photo in iter_photos(photos):
            digest, pixels = photo.read_once()
            if isinstance(pixels, UnusableImage):
                skipped[pixels.what] += 1
            sizes.append((0, 0) if isinstance(pixels, UnusableImage) else (pixels.shape[0], pixels.shape[1]))
            entries.append((photo.name, digest))
            bar.advance()
    digests = [digest for _, digest in entries]
    measured = {"sizes": sizes, "digests": digests, "skipped": skipped, "source": source_digest(entries)}
    write_json(out / RESUME / "sizes.json", measured)


def _measured(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / RESUME / "sizes.json").read_text()))


def _threshold_crops(config: CropsConfig, patches: Path, out: Path, runtime: Runtime) -> tuple[list[Row], dict[str, Any]]:
    accepted = count_images(patches)
    if not accepted:
        raise InputError("the artifact has no patches", where=patches, fix="name a patches artifact")
    places: dict[int, list[int]] = defaultdict(list)  # patch -> indices in the set
    for index, patch in enumerate(draw_patches(accepted, config.count, config.seed)):
        places[patch].append(index)
    rows: dict[int, Row] = {}
    with runtime.progress("Taking threshold crops", total=config.count, unit="images") as bar:
        for number, patch_row in enumerate(read_image_parquet(patches)):
            for index in places.get(number, ()):
                data: bytes = patch_row["image"]["bytes"]
                pixels = decode_rgb(data, str(patch_row["patch_id"]))
                if pixels.shape != (config.patch_px, config.patch_px, 3):
                    raise ConfigError(
                        f"the patches have {pixels.shape[0]} px, not {config.patch_px} px",
                        where="patch_px",
                        fix="set both to the size of the distilled images",
                    )
                write_atomically(out / image_set_name(index), data)
                rows[index] = {
                    **{name: patch_row[name] for name in ("photo", "y", "x")},
                    "psnr_bic": _psnr_bic(pixels, config),
                }
                bar.advance()
    return [rows[index] for index in range(config.count)], {
        "accepted": accepted,
        "repeated": config.count - len(places),
    }


def _psnr_bic(crop: np.ndarray, config: CropsConfig) -> float:
    return round(float(psnr_bic(to_float(crop), config.kernel, config.scale)), 4)


def _needed(source: Path | None, name: str, config: CropsConfig) -> Path:
    if source is None:
        raise ConfigError(f"{config.kind} crops need {name}", where="kind", fix=f"give the stage its input {name}")
    return source


STAGE = Stage(
    "crops", version=1, run=run, config=CropsConfig, section="III", words="{count:,} {kind} crops of {patch_px} px"
)
