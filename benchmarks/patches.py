"""Time of scoring photos by PSNR_bic compared with a plain loop over crops with OpenCV, and with decoding alone.

    python -m benchmarks.patches FOLDER_OF_JPEGS [--count 12] [--long-side 2040] [--threads 2] [--repeats 5]

The plain loop follows the authors' code: decode a photo, and for each 512-px window (stride 256) crop it, convert it to
gray, scale it down and up with INTER_CUBIC, and compute the PSNR. OpenCV may use the same number of threads. The
contestants take turns on the same photos, so that other load slows all of them; times are medians of the turns. "Scoring
alone" starts from decoded photos; "with decoding" is pass 1 of the stage: reading, digest, decoding, scoring, and one
small file of scores per photo.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from threadpoolctl import threadpool_limits

from ddsr_core.config import Runtime
from ddsr_core.imaging.decode import decode_rgb
from ddsr_core.imaging.images import encode_png
from ddsr_core.imaging.photos import find_images, iter_photos
from ddsr_core.parallel import prefetch
from ddsr_core.pseudo_labels import scoring
from ddsr_core.pseudo_labels.config import PatchesConfig
from ddsr_core.pseudo_labels.windows import score_windows

PATCH_PX, STRIDE_PX = 512, 256


def crop_psnr(patch: Image.Image) -> float:
    """PSNR_bic of one crop: gray, down, up, in float32."""
    gray = np.array(patch.convert("L")).astype(np.float32)
    small = cv2.resize(gray, (PATCH_PX // 4, PATCH_PX // 4), interpolation=cv2.INTER_CUBIC)
    again = cv2.resize(small, (PATCH_PX, PATCH_PX), interpolation=cv2.INTER_CUBIC)
    return float(20 * np.log10(255 / np.sqrt(np.mean((gray - again) ** 2))))


def crop_by_crop(photo: Image.Image) -> list[float]:
    """PSNR_bic of all windows, row by row."""
    width, height = photo.size
    return [
        crop_psnr(photo.crop((x, y, x + PATCH_PX, y + PATCH_PX)))
        for y in range(0, height - PATCH_PX + 1, STRIDE_PX)
        for x in range(0, width - PATCH_PX + 1, STRIDE_PX)
    ]


def open_rgb(data: bytes) -> Image.Image:
    """A decoded photo, as the plain loop reads it."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def drain(results: Iterable[Any]) -> None:
    for _ in results:
        pass


def prepare(source: Path, folder: Path, count: int, long_side: int) -> None:
    """JPEGs (quality 92) of the first photos, scaled to ``long_side`` pixels."""
    for path in find_images(source)[:count]:
        photo = Image.open(path).convert("RGB")
        factor = long_side / max(photo.size)
        size = round(photo.width * factor), round(photo.height * factor)
        photo.resize(size, Image.Resampling.LANCZOS).save(folder / f"{path.stem}.jpg", quality=92)


def contestants(folder: Path, threads: int, scratch: Path) -> dict[str, Callable[[], Any]]:
    """What is timed; one call processes all photos."""
    data = [path.read_bytes() for path in find_images(folder)]
    arrays = [decode_rgb(item, "photo") for item in data]
    images = [Image.fromarray(array) for array in arrays]
    base = PatchesConfig(patch_px=PATCH_PX, stride_px=STRIDE_PX)
    configs = {kernel: base.model_copy(update={"kernel": kernel}) for kernel in ("opencv", "matlab")}
    sources = list(iter_photos(folder))

    def ours_alone(config: PatchesConfig) -> None:
        with threadpool_limits(1, "blas"):
            drain(prefetch(lambda array: score_windows(array, config), arrays, threads))

    def stage(config: PatchesConfig) -> None:
        with tempfile.TemporaryDirectory(dir=scratch) as out:
            scoring.score_photos(config, folder, sources, Path(out), Runtime())

    return {
        "decoding alone": lambda: drain(prefetch(lambda item: np.asarray(open_rgb(item)), data, threads)),
        "scoring alone, crop by crop": lambda: [crop_by_crop(image) for image in images],
        **{f"scoring alone, ddsr {kernel}": partial(ours_alone, config) for kernel, config in configs.items()},
        "with decoding, crop by crop": lambda: [crop_by_crop(open_rgb(item)) for item in data],
        **{f"with decoding, ddsr {kernel}": partial(stage, config) for kernel, config in configs.items()},
        "one accepted patch as PNG": lambda: [encode_png(array[:PATCH_PX, :PATCH_PX].copy(), level=1) for array in arrays],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--long-side", type=int, default=2040, help="scale the photos to this long side first, in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    cv2.setNumThreads(options.threads)
    scoring.WORKERS = options.threads

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "photos"
        folder.mkdir()
        prepare(options.photos, folder, options.count, options.long_side)
        timed = contestants(folder, options.threads, Path(temporary))
        wall: dict[str, list[float]] = {name: [] for name in timed}
        cpu: dict[str, list[float]] = {name: [] for name in timed}
        for turn in range(options.repeats + 1):  # the first turn warms up
            for name, work in timed.items():
                started = time.perf_counter(), time.process_time()
                work()
                if turn:
                    wall[name].append((time.perf_counter() - started[0]) / options.count)
                    cpu[name].append((time.process_time() - started[1]) / options.count)

    def ratio(of: str, to: str) -> str:
        return f"{statistics.median(a / b for a, b in zip(wall[of], wall[to], strict=True)):.2f}"

    print(f"{options.count} photos, long side {options.long_side} px, {options.threads} threads; ms per photo\n")
    print("| | wall | CPU | speed relative to crop by crop | time relative to decoding alone |")
    print("|---|---|---|---|---|")
    for name in timed:
        peer = f"{name.split(',')[0]}, crop by crop"
        faster = ratio(peer, name) if peer in timed else "-"
        longer = ratio(name, "decoding alone") if name.startswith("with") else "-"
        medians = f"{statistics.median(wall[name]) * 1e3:.1f} | {statistics.median(cpu[name]) * 1e3:.1f}"
        print(f"| {name} | {medians} | {faster} | {longer} |")


if __name__ == "__main__":
    main()
