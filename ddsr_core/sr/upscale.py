"""Enlarge images with an SR network: any weights that ``ddsr`` trained or that spandrel opens.

The scale is read from the weights: an x2 network gives x2 images. A network that keeps the size is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch import nn

from ddsr_core.config import Runtime, resolve_device
from ddsr_core.errors import InputError
from ddsr_core.imaging.bicubic import upsample
from ddsr_core.imaging.decode import MAX_PIXELS, Picture, decode_picture, image_size
from ddsr_core.imaging.images import encode_png, to_float, to_uint8
from ddsr_core.imaging.photos import IMAGE_SUFFIXES, Photo, find_images, shown
from ddsr_core.imaging.tiling import count_tiles, enlarge
from ddsr_core.sr.weights import load_network
from ddsr_core.storage.files import write_atomically

Existing = Literal["refuse", "skip", "overwrite"]
#: LR pixels of context around a tile. Small tiles get a quarter of their side.
OVERLAP_PX = 32


@dataclass(frozen=True)
class Upscaled:
    """Result of `upscale`.

    Attributes:
        network: name of the network.
        scale: its upsampling factor.
        written: the PNG files written, in the order of the inputs.
        kept: outputs that existed before (``existing="skip"``).
        skipped: input files that could not be enlarged, with the reason.
    """

    network: str
    scale: int
    written: list[Path]
    kept: list[Path]
    skipped: dict[Path, str]


@dataclass(frozen=True)
class Upscaling:
    """Images to enlarge, checked before the first one is read.

    Attributes:
        network: name of the network.
        scale: its upsampling factor.
        module: the network itself.
        jobs: input file -> PNG file to write.
        kept: outputs that exist and stay (``existing="skip"``).
    """

    network: str
    scale: int
    module: nn.Module
    jobs: Mapping[Path, Path]
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
    the same subfolders as the input. Files below ``output`` are never inputs. Alpha is enlarged bicubically, EXIF
    orientation is applied, and an RGB color profile is kept. The output always has 8 bits per channel.

    Args:
        inputs: an image, a folder, or several of either.
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
    """
    return enlarge_all(plan_upscaling(inputs, output, weights, scale, existing, trust), tile_px, runtime or Runtime())


def plan_upscaling(
    inputs: Path | Sequence[Path], output: Path, weights: Path, scale: int | None, existing: Existing, trust: bool
) -> Upscaling:
    """Find the images, and load the network. Arguments and errors are those of `upscale`."""
    jobs, kept = _plan([inputs] if isinstance(inputs, Path) else list(inputs), Path(output), existing)
    network, factor, name = load_network(Path(weights), trust)
    _check_scale(factor, scale, name, weights)
    return Upscaling(name, factor, network, jobs, kept)


def enlarge_all(planned: Upscaling, tile_px: int, runtime: Runtime) -> Upscaled:
    """Enlarge the images. One of several that cannot be enlarged is skipped.

    Raises:
        InputError: no image could be enlarged.
    """
    jobs, name, factor = planned.jobs, planned.network, planned.scale
    overlap_px = min(OVERLAP_PX, tile_px // 4)
    device = resolve_device(runtime.device)
    network = planned.module.to(device).eval()
    done = Upscaled(name, factor, [], planned.kept, {})
    tiles = sum(_count_tiles(source, tile_px, overlap_px) for source in jobs)
    with runtime.progress(f"Upscaling with {name}", total=tiles, unit="tiles") as bar:
        for source, target in jobs.items():
            try:
                picture = read_picture(source)
                if picture.rgb.shape[0] * picture.rgb.shape[1] * factor**2 > MAX_PIXELS:
                    raise InputError("too large to enlarge", where=source, fix="cut it into smaller images first")
                sr = _enlarge(network, picture, device, factor, tile_px, overlap_px, bar.advance)
            except InputError as error:
                if len(jobs) == 1:
                    raise
                done.skipped[source] = error.what
                continue
            write_atomically(target, encode_png(sr, icc_profile=picture.icc_profile))
            done.written.append(target)
    if jobs and not done.written:
        source, reason = next(iter(done.skipped.items()))
        raise InputError(f"none of {len(jobs)} images could be enlarged: {reason}", where=source, fix="see the reason above")
    return done


def read_picture(path: Path) -> Picture:
    """Read an image file in any format that `decode_rgb` accepts.

    Raises:
        UnusableImage: the image cannot be read.
    """
    photo = Photo(shown(path), Path(path).read_bytes)
    return decode_picture(photo.content(), photo.name)


def _check_scale(scale: int, expected: int | None, name: str, weights: Path) -> None:
    if scale == 1:
        raise InputError(f"{name} keeps the size (x1)", where=weights, fix="use weights of a network that enlarges")
    if expected not in (None, scale):
        raise InputError(f"the weights enlarge x{scale}, not x{expected}", where=weights, fix=f"use x{expected} weights")


def _plan(inputs: list[Path], output: Path, existing: Existing) -> tuple[dict[Path, Path], list[Path]]:
    """Map of inputs to outputs to write, and the existing outputs to keep."""
    suffix = output.suffix.lower()
    if suffix in IMAGE_SUFFIXES - {".png"} and not output.is_dir():
        raise InputError(f"{suffix} files cannot be written", where=output, fix="name a .png file or a folder")
    single_file = suffix == ".png" and not output.is_dir()
    named = [(path, target) for item in inputs for path, target in _targets(Path(item).expanduser(), output)]
    if not named:
        raise InputError(
            "no images to enlarge",
            where=", ".join(map(str, inputs)),
            fix="name an image or a folder",
        )
    if single_file:
        if len(named) > 1:
            raise InputError("several images cannot go to one file", where=output, fix="name a folder as output")
        named = [(named[0][0], output)]
    sources = {path.resolve() for path, _ in named}
    jobs: dict[Path, Path] = {}
    kept: list[Path] = []
    taken: dict[Path, Path] = {}
    for path, target in named:
        if target.resolve() in sources:
            raise InputError("the output would replace an input image", where=target, fix="name another output")
        if target in taken:
            raise InputError(
                f"{taken[target].name} and {path.name} would both be written to {target.name}",
                where=path,
                fix="rename one of them",
            )
        taken[target] = path
        if target.exists() and existing == "refuse":
            raise InputError("the output already exists", where=target, fix="name another output, or overwrite it")
        if target.exists() and existing == "skip":
            kept.append(target)
        else:
            jobs[path] = target
    return jobs, kept


def _targets(source: Path, output: Path) -> list[tuple[Path, Path]]:
    if source.is_dir():
        if source.resolve() == output.resolve():
            raise InputError("input and output are the same folder", where=output, fix="name another output folder")
        outputs = output.resolve()
        images = [path for path in find_images(source) if not path.resolve().is_relative_to(outputs)]
        return [(path, output / path.relative_to(source).with_suffix(".png")) for path in images]
    if not source.is_file():
        raise InputError("no such image or folder", where=source, fix="check the path")
    return [(source, output / f"{source.stem}.png")]


def _count_tiles(path: Path, tile_px: int, overlap_px: int) -> int:
    try:
        size = image_size(Path(path).read_bytes())
    except OSError:
        size = None
    # A file without a size is skipped, with its reason, when it is read.
    return 0 if size is None else count_tiles(size[1], size[0], tile_px, overlap_px)


def _enlarge(
    network: nn.Module,
    picture: Picture,
    device: str,
    scale: int,
    tile_px: int,
    overlap_px: int,
    on_tile: Callable[[], object],
) -> np.ndarray:
    lr = to_float(picture.rgb).to(device)
    sr = to_uint8(enlarge(network, lr, scale=scale, tile_px=tile_px, overlap_px=overlap_px, on_tile=on_tile))[0]
    if picture.alpha is None:
        return sr
    opacity = to_uint8(upsample(to_float(picture.alpha[..., None]), scale))[0]
    return np.concatenate([sr, opacity], 2)
