"""Enlarge images with an SR network: any weights that ``ddsr`` trained or that spandrel can read."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageOps

from ddsr_core.config import Runtime, resolve_device
from ddsr_core.errors import InputError
from ddsr_core.images import MAX_PIXELS, decode_rgb, encode_png, find_images, to_float, to_uint8
from ddsr_core.store import write_atomically

if TYPE_CHECKING:
    from torch import nn

Existing = Literal["refuse", "skip", "overwrite"]
#: LR pixels around a tile that give context; a small tile gets a quarter of its side.
OVERLAP_PX = 32


@dataclass(frozen=True)
class Upscaled:
    """What `upscale` did.

    Attributes:
        network: name of the network.
        scale: its enlargement.
        written: the PNG files, in the order of the inputs.
        kept: outputs that were there already (``existing="skip"``).
        skipped: why an input file could not be enlarged.
    """

    network: str
    scale: int
    written: list[Path]
    kept: list[Path]
    skipped: dict[Path, str]


def upscale(
    inputs: Path | Sequence[Path],
    output: Path,
    weights: Path,
    *,
    tile_px: int = 512,
    existing: Existing = "refuse",
    runtime: Runtime | None = None,
) -> Upscaled:
    """Enlarge images to PNG files.

    One image goes to ``output`` where that ends in ``.png``; else ``output`` is a folder, which gets
    ``<name>.png`` for each image, in the subfolders of the input folder. What lies below ``output`` is never
    taken as input. Transparency is enlarged bicubically; EXIF orientation is applied.

    Args:
        inputs: an image, a folder, or several of either.
        output: a ``.png`` file or a folder.
        weights: a ``train-sr`` folder, our weights file, or any file of a network that spandrel reads.
        tile_px: side of the tiles that an image of more pixels is cut into, in input pixels; 0 never tiles.
        existing: what becomes of outputs that are already there.
        runtime: device and progress.

    Raises:
        InputError: nothing to enlarge, unreadable weights, an output that would replace an input or an
            existing file,
            or no image that could be enlarged.
    """
    from ddsr_core.sr.weights import load_network

    runtime = runtime or Runtime()
    jobs, kept = _plan([inputs] if isinstance(inputs, Path) else list(inputs), Path(output), existing)
    overlap_px = min(OVERLAP_PX, tile_px // 4)
    network, scale, name = load_network(Path(weights))
    device = resolve_device(runtime.device)
    network = network.to(device).eval()
    done = Upscaled(name, scale, [], kept, {})
    tiles = sum(_count_tiles(source, tile_px, overlap_px) for source in jobs)
    with runtime.progress(f"Upscaling with {name}", total=tiles, unit="tiles") as bar:
        for source, target in jobs.items():
            try:
                rgb, alpha = read_rgb_alpha(source)
                if rgb.shape[0] * rgb.shape[1] * scale**2 > MAX_PIXELS:
                    raise InputError("too large to enlarge", where=source, mend="cut it into pieces first")
                sr = _enlarge(network, rgb, alpha, device, scale, tile_px, overlap_px, bar.advance)
            except InputError as error:
                if len(jobs) == 1:
                    raise
                done.skipped[source] = error.what
                continue
            write_atomically(target, encode_png(sr))
            done.written.append(target)
    if jobs and not done.written:
        source, reason = next(iter(done.skipped.items()))
        raise InputError(f"none of {len(jobs)} images could be enlarged: {reason}", where=source, mend="see the reason")
    return done


def read_rgb_alpha(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """RGB uint8 (H, W, 3), and transparency uint8 (H, W) where the image has any.

    Raises:
        InputError: the image cannot be read.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError("cannot be read", where=path, mend=str(error)) from error
    rgb = decode_rgb(data, str(path))  # checks it in every way, and lays transparency on white
    image = Image.open(io.BytesIO(data))
    if "A" not in image.getbands() and "transparency" not in image.info:
        return rgb, None
    pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGBA"))
    return pixels[..., :3], pixels[..., 3]


def _plan(inputs: list[Path], output: Path, existing: Existing) -> tuple[dict[Path, Path], list[Path]]:
    """Input -> output of what is to be made, and the outputs that are kept."""
    single_file = output.suffix.lower() == ".png" and not output.is_dir()
    named = [(path, target) for item in inputs for path, target in _targets(Path(item).expanduser(), output)]
    if not named:
        raise InputError(
            "no images to enlarge",
            where=", ".join(map(str, inputs)),
            mend="name an image or a folder",
        )
    if single_file:
        if len(named) > 1:
            raise InputError("many images cannot go to one file", where=output, mend="name a folder as output")
        named = [(named[0][0], output)]
    sources = {path.resolve() for path, _ in named}
    jobs: dict[Path, Path] = {}
    kept: list[Path] = []
    taken: dict[Path, Path] = {}
    for path, target in named:
        if target.resolve() in sources:
            raise InputError("the output would replace an input image", where=target, mend="name another output")
        if target in taken:
            raise InputError(
                f"{taken[target].name} and {path.name} would both become {target.name}",
                where=path,
                mend="rename one of them",
            )
        taken[target] = path
        if target.exists() and existing == "refuse":
            raise InputError("the output is already there", where=target, mend="name another output, or overwrite")
        if target.exists() and existing == "skip":
            kept.append(target)
        else:
            jobs[path] = target
    return jobs, kept


def _targets(source: Path, output: Path) -> list[tuple[Path, Path]]:
    if source.is_dir():
        if source.resolve() == output.resolve():
            raise InputError("input and output are the same folder", where=output, mend="name another output folder")
        made_before = output.resolve()
        images = [path for path in find_images(source) if not path.resolve().is_relative_to(made_before)]
        return [(path, output / path.relative_to(source).with_suffix(".png")) for path in images]
    if not source.is_file():
        raise InputError("there is no such image or folder", where=source, mend="check the path")
    return [(source, output / f"{source.stem}.png")]


def _count_tiles(path: Path, tile_px: int, overlap_px: int) -> int:
    from ddsr_core.tiling import count_tiles

    try:
        with Image.open(path) as image:
            return count_tiles(image.height, image.width, tile_px, overlap_px)
    except (OSError, ValueError, Image.DecompressionBombError):
        return 0  # it will be skipped, with its reason, when its turn comes


def _enlarge(
    network: nn.Module,
    rgb: np.ndarray,
    alpha: np.ndarray | None,
    device: str,
    scale: int,
    tile_px: int,
    overlap_px: int,
    on_tile: Callable[[], object],
) -> np.ndarray:
    from ddsr_core.bicubic import upsample
    from ddsr_core.tiling import enlarge

    lr = to_float(rgb).to(device)
    sr = to_uint8(enlarge(network, lr, scale=scale, tile_px=tile_px, overlap_px=overlap_px, on_tile=on_tile))[0]
    if alpha is None:
        return sr
    opacity = to_uint8(upsample(to_float(np.repeat(alpha[..., None], 3, 2)), scale))[0, ..., :1]
    return np.concatenate([sr, opacity], 2)
