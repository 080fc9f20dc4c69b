"""The baselines that a distilled set is measured against (paper, Table III): as many real images of the same size.

*Random crop* cuts them anywhere from all photos; *threshold crop* takes them from the patches that passed the PSNR_bic
threshold. *Full* needs nothing from here: train on the photo folder itself.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ddsr_core.config import Runtime, StageConfig
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.imaging import images
from ddsr_core.imaging.kernel import Kernel
from ddsr_core.sr.data import count_images
from ddsr_core.storage.files import write_atomically, write_json
from ddsr_core.storage.stage import RESUME, Stage, StageResult

Row = dict[str, Any]


class CropsConfig(StageConfig):
    """Which crops, how many, how large."""

    kind: Literal["random", "threshold"] = Field("random", description="from anywhere, or from the accepted patches")
    count: int = Field(420, ge=1, description="images, as many as the distilled set has")
    patch_px: int = Field(512, ge=16, multiple_of=4, description="height and width, pixels")
    kernel: Kernel = Field("matlab", description="bicubic kernel of the psnr_bic that is written down")
    seed: int = Field(42, ge=0, lt=2**31, description="of the choice")


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
        ConfigError: the input of that kind is not given, or the patches have another size.
        InputError: no photo is large enough, or there are no patches.
    """
    import pyarrow as pa

    needed = photos if config.kind == "random" else patches
    if needed is None:
        name = "photos" if config.kind == "random" else "patches"
        raise ConfigError(f"{config.kind} crops need {name}", where="kind", fix=f"give the stage its input {name}")
    write = _random_crops if config.kind == "random" else _threshold_crops
    rows, facts = write(config, needed, out, runtime)
    fields = {"photo": pa.string(), "y": pa.int32(), "x": pa.int32(), "psnr_bic": pa.float32()}
    images.finish_image_set(out, rows, fields)
    counts = {
        "kind": config.kind,
        "count": len(rows),
        "patch_px": config.patch_px,
        "psnr_bic_mean": round(float(np.mean([row["psnr_bic"] for row in rows])), 4),
        **facts,
    }
    write_json(out / "summary.json", counts)
    return StageResult(counts=counts)


def draw_crop(sizes: np.ndarray, patch_px: int, seed: int, index: int) -> tuple[int, int, int]:
    """Photo, y and x of crop ``index``: a photo in proportion to its area, then any place in it.

    Args:
        sizes: (n, 2) heights and widths; photos smaller than ``patch_px`` are never drawn.
        patch_px: height and width of the crop.
        seed, index: what the draw depends on.
    """
    generator = np.random.default_rng([seed, index])
    areas = np.where(sizes.min(axis=1) >= patch_px, sizes.prod(axis=1), 0).cumsum()
    photo = int(np.searchsorted(areas, generator.integers(areas[-1]), side="right"))
    y, x = (int(generator.integers(side - patch_px + 1)) for side in sizes[photo])
    return photo, y, x


def draw_patches(available: int, count: int, seed: int) -> list[int]:
    """``count`` of ``available`` patches, each equally likely, none twice before all have been taken once."""
    generator = np.random.default_rng(seed)
    rounds = -(-count // available)
    return [int(i) for _ in range(rounds) for i in generator.permutation(available)][:count]


def _random_crops(config: CropsConfig, photos: Path, out: Path, runtime: Runtime) -> tuple[list[Row], dict[str, Any]]:
    sizes, skipped = _sizes(photos, out, runtime)
    if not len(sizes) or sizes.min(axis=1).max() < config.patch_px:
        raise InputError(
            f"no photo is as large as a crop of {config.patch_px} px",
            where=photos,
            fix="bring larger photos or lower patch_px",
        )
    crops: dict[int, list[tuple[int, int, int]]] = defaultdict(list)  # photo -> (index, y, x)
    for index in range(config.count):
        number, y, x = draw_crop(sizes, config.patch_px, config.seed, index)
        crops[number].append((index, y, x))
    rows: dict[int, Row] = {}
    with runtime.progress("Cutting random crops", total=config.count, unit="images") as bar:
        for number, photo in enumerate(images.iter_photos(photos)):
            pixels = photo.read() if number in crops else None
            for index, y, x in crops.get(number, ()):
                crop = pixels[y : y + config.patch_px, x : x + config.patch_px]  # type: ignore[index]
                images.save_png(out / images.image_set_name(index), crop)
                rows[index] = {"photo": photo.name, "y": y, "x": x, "psnr_bic": _psnr_bic(crop, config.kernel)}
                bar.advance()
    return [rows[index] for index in range(config.count)], {"photos": len(crops), "skipped": skipped}


def _sizes(photos: Path, out: Path, runtime: Runtime) -> tuple[np.ndarray, dict[str, int]]:
    """(n, 2) heights and widths as decoded, (0, 0) for what cannot be; and the latter counted by reason."""
    store = out / RESUME / "sizes.json"
    if not store.exists():
        sizes: list[tuple[int, int]] = []
        skipped: Counter[str] = Counter()
        with runtime.progress("Measuring photos", total=count_images(photos), unit="photos") as bar:
            for photo in images.iter_photos(photos):
                try:
                    height, width = photo.read().shape[:2]
                except InputError as error:
                    height, width = 0, 0
                    skipped[error.what] += 1
                sizes.append((height, width))
                bar.advance()
        write_json(store, {"sizes": sizes, "skipped": skipped})
    facts = json.loads(store.read_text())
    return np.array(facts["sizes"], np.int64).reshape(-1, 2), facts["skipped"]


def _threshold_crops(config: CropsConfig, patches: Path, out: Path, runtime: Runtime) -> tuple[list[Row], dict[str, Any]]:
    accepted = count_images(patches)
    if not accepted:
        raise InputError("no patches there", where=patches, fix="name a patches artifact")
    places: dict[int, list[int]] = defaultdict(list)  # patch -> indices in the set
    for index, patch in enumerate(draw_patches(accepted, config.count, config.seed)):
        places[patch].append(index)
    rows: dict[int, Row] = {}
    with runtime.progress("Taking threshold crops", total=config.count, unit="images") as bar:
        for number, patch_row in enumerate(images.read_image_parquet(patches)):
            for index in places.get(number, ()):
                data: bytes = patch_row["image"]["bytes"]
                pixels = images.decode_rgb(data, str(patch_row["patch_id"]))
                if pixels.shape != (config.patch_px, config.patch_px, 3):
                    raise ConfigError(
                        f"the patches have {pixels.shape[0]} px, the crops want {config.patch_px}",
                        where="patch_px",
                        fix="set both to the size of the distilled images",
                    )
                write_atomically(out / images.image_set_name(index), data)
                rows[index] = {
                    **{name: patch_row[name] for name in ("photo", "y", "x")},
                    "psnr_bic": _psnr_bic(pixels, config.kernel),
                }
                bar.advance()
    return [rows[index] for index in range(config.count)], {
        "accepted": accepted,
        "repeated": config.count - len(places),
    }


def _psnr_bic(crop: np.ndarray, kernel: Kernel) -> float:
    from ddsr_core.imaging.bicubic import psnr_bic

    return round(float(psnr_bic(images.to_float(crop), kernel)), 4)


STAGE = Stage("crops", version=1, run=run, config=CropsConfig, section="III")
