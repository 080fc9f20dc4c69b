"""Enlarge images with an SR network: any weights that ``ddsr`` trained or that spandrel opens.

The scale is read from the weights: an x2 network gives x2 images. A network that keeps the size is refused.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.ndimage import distance_transform_edt
from torch import nn

from ddsr_core.config import Runtime, resolve_device
from ddsr_core.errors import InputError
from ddsr_core.imaging.bicubic import upsample
from ddsr_core.imaging.decode import MAX_PIXELS, Picture, UnusableImage, decode_picture, image_size, plain_reason
from ddsr_core.imaging.images import encode_png, to_float, to_uint8
from ddsr_core.imaging.photos import IMAGE_SUFFIXES, Photo, file_photo, folder_photos, shown
from ddsr_core.imaging.tiling import count_tiles, enlarge
from ddsr_core.sr.weights import load_network
from ddsr_core.storage.files import storage_errors, write_atomically
from ddsr_core.storage.stage import require_whole

Existing = Literal["refuse", "skip", "overwrite"]
#: LR pixels of context around a tile. Small tiles get a quarter of their side.
OVERLAP_PX = 32


#: Errors of a disk that would meet the next image, too. Any other error in writing concerns one file, such as its name.
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})


@dataclass(frozen=True)
class Upscaled:
    """Result of `upscale`.

    Attributes:
        network: name of the network.
        scale: its upsampling factor.
        written: the PNG files written, in the order of the inputs.
        kept: outputs that existed before (``existing="skip"``).
        skipped: what looks like an image and was not enlarged, with the reason: damaged, a format that is not decoded, or
            an output that cannot be written.
    """

    network: str
    scale: int
    written: list[Path]
    kept: list[Path]
    skipped: dict[Path, str]


@dataclass(frozen=True)
class _Job:
    """One image to enlarge: what the gate for photos says of it, where it was found, and where its result goes."""

    photo: Photo
    source: Path
    target: Path


@dataclass(frozen=True)
class Upscaling:
    """Images to enlarge, checked before the first one is read.

    Attributes:
        network: name of the network.
        scale: its upsampling factor.
        module: the network itself.
        jobs: the images, and the PNG files to write.
        kept: outputs that exist and stay (``existing="skip"``).
    """

    network: str
    scale: int
    module: nn.Module
    jobs: list[_Job]
    kept: list[Path]


def upscale(
    inputs: Path | Sequence[Path],
    output: Path,
    weights: Path,
    *,
    scale: int | None = None,
    tile_px: int = 512,
    existing: Existing = "refuse",
    trust: bool = False,
    runtime: Runtime | None = None,
) -> Upscaled:
    """Enlarge images to PNG files.

    If ``output`` ends in ``.png`` it takes one image. Otherwise it is a folder that gets ``<name>.png`` for each image, in
    the same subfolders as the input. Files below ``output`` are never inputs. Alpha is enlarged bicubically, colors
    of fully transparent pixels are those of the nearest visible one, EXIF
    orientation is applied, and an RGB color profile is kept. The output always has 8 bits per channel.

    Args:
        inputs: an image, a folder, or several of either. What counts as an image: `ddsr_core.imaging.photos`.
        output: a ``.png`` file or a folder.
        weights: a ``train_sr`` folder, one of its files, or any file that spandrel opens.
        scale: upsampling factor that the weights must have; None accepts any.
        tile_px: larger images are processed in tiles of this side, in input pixels; 0 disables tiling.
        existing: what to do with outputs that already exist.
        trust: whether a weights file may import the ``module:Class`` that it names.
        runtime: device and progress.

    Raises:
        InputError: no images, unusable weights, weights of another scale, an output that is not a PNG or would replace an
            input or an existing file, or no image could be enlarged.
        StorageError: the disk is full, read-only or damaged, or ``weights`` is a damaged artifact.
    """
    return enlarge_all(plan_upscaling(inputs, output, weights, scale, existing, trust), tile_px, runtime or Runtime())


def plan_upscaling(
    inputs: Path | Sequence[Path], output: Path, weights: Path, scale: int | None, existing: Existing, trust: bool
) -> Upscaling:
    """Find the images, and load the network. Arguments and errors are those of `upscale`."""
    jobs, kept = _plan([inputs] if isinstance(inputs, Path) else list(inputs), Path(output), existing)
    require_whole(weights)
    network, factor, name = load_network(Path(weights), trust)
    _check_scale(factor, scale, name, weights)
    return Upscaling(name, factor, network, jobs, kept)


def enlarge_all(planned: Upscaling, tile_px: int, runtime: Runtime) -> Upscaled:
    """Enlarge the images. One of several that cannot be enlarged is skipped.

    Raises:
        InputError: no image could be enlarged.
        StorageError: the disk is full, read-only or damaged.
    """
    jobs, name, factor = planned.jobs, planned.network, planned.scale
    overlap_px = min(OVERLAP_PX, tile_px // 4)
    device = resolve_device(runtime.device)
    network = planned.module.to(device).eval()
    done = Upscaled(name, factor, [], planned.kept, {})
    tiles = sum(_count_tiles(job.photo, tile_px, overlap_px) for job in jobs)
    with runtime.progress(f"Upscaling with {name}", total=tiles, unit="tiles") as bar:
        for job in jobs:
            try:
                picture = decode_picture(job.photo.content(), job.photo.name)
                if picture.rgb.shape[0] * picture.rgb.shape[1] * factor**2 > MAX_PIXELS:
                    raise InputError("too large to enlarge", fix="cut it into smaller images first")
                sr = _enlarge(network, picture, device, factor, tile_px, overlap_px, bar.advance)
                _write(job.target, encode_png(sr, icc_profile=picture.icc_profile))
                done.written.append(job.target)
            except InputError as error:
                if len(jobs) == 1:
                    raise InputError(error.what, where=job.source, fix=error.fix) from error
                done.skipped[job.source] = error.reason if isinstance(error, UnusableImage) else error.what
    if jobs and not done.written:
        source, reason = next(iter(done.skipped.items()))
        raise InputError(f"none of {len(jobs)} images could be enlarged: {reason}", where=source, fix="see the reason above")
    return done


def read_picture(path: Path) -> Picture:
    """Read an image file in any format that `decode_rgb` accepts.

    Raises:
        UnusableImage: the image cannot be read.
    """
    photo = file_photo(Path(path), shown(path))
    return decode_picture(photo.content(), photo.name)


def _write(target: Path, png: bytes) -> None:
    """
    Raises:
        UnusableImage: this file cannot be written, for example because its name is too long.
        StorageError: no file can be written.
    """
    try:
        write_atomically(target, png)
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            with storage_errors(target):
                raise
        raise UnusableImage(f"cannot be written: {plain_reason(error)}", where=target, fix="rename the image") from error


def _check_scale(scale: int, expected: int | None, name: str, weights: Path) -> None:
    if scale == 1:
        raise InputError(f"{name} keeps the size (x1)", where=weights, fix="use weights of a network that enlarges")
    if expected not in (None, scale):
        raise InputError(f"the weights enlarge x{scale}, not x{expected}", where=weights, fix=f"use x{expected} weights")


def _plan(inputs: list[Path], output: Path, existing: Existing) -> tuple[list[_Job], list[Path]]:
    """The images to enlarge, and the existing outputs to keep."""
    named = [job for item in inputs for job in _jobs(Path(item).expanduser(), output)]
    if not named:
        raise InputError("no images to enlarge", where=", ".join(map(str, inputs)), fix="name an image or a folder")
    named = _to_one_file(named, output) if _is_file(output) else named
    sources = {job.source.resolve() for job in named}
    jobs: list[_Job] = []
    kept: list[Path] = []
    taken: dict[Path, Path] = {}
    for job in named:
        if job.target.resolve() in sources:
            raise InputError("the output would replace an input image", where=job.target, fix="name another output")
        if job.target in taken:
            raise InputError(
                f"{taken[job.target].name} and {job.source.name} would both be written to {job.target.name}",
                where=job.source,
                fix="rename one of them",
            )
        taken[job.target] = job.source
        exists = os.path.exists(job.target)  # False for a name that is too long, where Path.exists raises
        if exists and existing == "refuse":
            raise InputError("the output already exists", where=job.target, fix="name another output, or overwrite it")
        if exists and existing == "skip":
            kept.append(job.target)
        else:
            jobs.append(job)
    return jobs, kept


def _is_file(output: Path) -> bool:
    """Whether the output is one file, not a folder.

    Raises:
        InputError: a file that is not a PNG.
    """
    suffix = output.suffix.lower()
    if output.is_dir():
        return False
    if suffix in IMAGE_SUFFIXES - {".png"}:
        raise InputError(f"{suffix} files cannot be written", where=output, fix="name a .png file or a folder")
    return suffix == ".png"


def _to_one_file(named: list[_Job], output: Path) -> list[_Job]:
    if len(named) > 1:
        raise InputError("several images cannot go to one file", where=output, fix="name a folder as output")
    return [replace(named[0], target=output)]


def _jobs(source: Path, output: Path) -> list[_Job]:
    require_whole(source)
    if source.is_dir():
        if source.resolve() == output.resolve():
            raise InputError("input and output are the same folder", where=output, fix="name another output folder")
        outputs = output.resolve()
        found = [(photo, photo.path or source / photo.name) for photo in folder_photos(source)]
        return [
            _Job(photo, path, output / path.relative_to(source).with_suffix(".png"))
            for photo, path in found
            if not path.resolve().is_relative_to(outputs)
        ]
    if not source.exists():
        raise InputError("no such image or folder", where=source, fix="check the path")
    return [_Job(file_photo(source, shown(source)), source, output / f"{source.stem}.png")]


def _count_tiles(photo: Photo, tile_px: int, overlap_px: int) -> int:
    try:
        size = image_size(photo.content())
    except UnusableImage:
        size = None
    # A file without a size is skipped, with its reason, when it is enlarged.
    return 0 if size is None else count_tiles(size[1], size[0], tile_px, overlap_px)


def visible_colors(picture: Picture) -> np.ndarray:
    """The colors, ``uint8 (H, W, 3)``, with those of fully transparent pixels replaced by the nearest visible color.

    Networks mix neighbors: hidden black around a white drawing would become a gray fringe.
    """
    hidden = np.zeros(picture.rgb.shape[:2], bool) if picture.alpha is None else picture.alpha == 0
    if not hidden.any() or hidden.all():
        return picture.rgb
    rows, columns = distance_transform_edt(hidden, return_distances=False, return_indices=True)
    return np.ascontiguousarray(picture.rgb[rows, columns])


def _enlarge(
    network: nn.Module,
    picture: Picture,
    device: str,
    scale: int,
    tile_px: int,
    overlap_px: int,
    on_tile: Callable[[], object],
) -> np.ndarray:
    lr = to_float(visible_colors(picture)).to(device)
    sr = to_uint8(enlarge(network, lr, scale=scale, tile_px=tile_px, overlap_px=overlap_px, on_tile=on_tile))[0]
    if picture.alpha is None:
        return sr
    opacity = to_uint8(upsample(to_float(picture.alpha[..., None]), scale))[0]
    return np.concatenate([sr, opacity], 2)
