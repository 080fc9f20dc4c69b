"""Peak memory of the patches and embeddings stages on 1x, 10x and 100x photos.

    python -m benchmarks.memory FOLDER_OF_PHOTOS [--photos 16] [--side 192] [--patch-px 96]

The photos are JPEGs cropped from the given ones, all different. Each stage runs in its own process; its peak resident
memory is the operating system's figure and includes the libraries.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from ddsr_core.config import Runtime
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.photos import find_images
from ddsr_core.pseudo_labels import embeddings, patches
from ddsr_core.pseudo_labels.config import EmbeddingsConfig, PatchesConfig
from ddsr_core.pseudo_labels.patches import read_summary

FACTORS = (1, 10, 100)
ROOT = Path(__file__).resolve().parents[1]


def cut_photos(source: Path, folder: Path, count: int, side: int) -> None:
    """``count`` different JPEGs: random crops, taken from the photos in turn."""
    folder.mkdir()
    random = np.random.default_rng(0)
    originals = [read_rgb(path) for path in find_images(source)[:16]]
    for index in range(count):
        photo = originals[index % len(originals)]
        y, x = (int(random.integers(0, length - side + 1)) for length in photo.shape[:2])
        Image.fromarray(photo[y : y + side, x : x + side].copy()).save(folder / f"{index:06d}.jpg", quality=92)


def run_stage(stage: str, folder: Path, out: Path, patch_px: int) -> None:
    """Run one stage and print the peak resident memory of this process, MiB."""
    if stage == "patches":
        config = PatchesConfig(patch_px=patch_px, stride_px=patch_px)
        patches.run(config, photos=folder, out=out, runtime=Runtime())
    else:
        small = EmbeddingsConfig(backend="vgg16", image_px=32)
        embeddings.run(small, patches=folder, out=out, runtime=Runtime())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak / (2**20 if sys.platform == "darwin" else 2**10))  # macOS counts bytes, others KiB


def peak_of(*arguments: object) -> float:
    """Peak MiB of one stage in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of photos")
    parser.add_argument("--photos", type=int, default=16, help="number of photos at 1x")
    parser.add_argument("--side", type=int, default=192, help="height and width of a photo, pixels")
    parser.add_argument("--patch-px", type=int, default=96)
    parser.add_argument("--factors", type=int, nargs="+", default=FACTORS, help="multiples of --photos to measure")
    parser.add_argument("--stage", nargs=3, metavar=("NAME", "INPUT", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.stage:
        name, given, out = options.stage
        run_stage(name, Path(given), Path(out), options.patch_px)
        return

    print(f"photos of {options.side} px, patches of {options.patch_px} px; peak resident memory, MiB\n")
    print("| photos | windows | accepted patches | patches stage | embeddings stage |\n|---|---|---|---|---|")
    for factor in options.factors:
        with tempfile.TemporaryDirectory() as temporary:
            photos, cut, table = (Path(temporary) / name for name in ("photos", "patches", "embeddings"))
            cut_photos(options.source, photos, options.photos * factor, options.side)
            cut.mkdir()
            table.mkdir()
            size = "--patch-px", options.patch_px
            first = peak_of(options.source.resolve(), *size, "--stage", "patches", photos, cut)
            second = peak_of(options.source.resolve(), *size, "--stage", "embeddings", cut, table)
            counts = read_summary(cut)
            row = f"{counts['photos']} ({factor}x) | {counts['total']} | {counts['accepted']}"
            print(f"| {row} | {first:.0f} | {second:.0f} |", flush=True)


if __name__ == "__main__":
    main()
