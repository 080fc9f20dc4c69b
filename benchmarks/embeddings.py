"""Rate of the embeddings stage (VGG16) compared with a Pillow loop over single patches, and with the network alone.

    python -m benchmarks.embeddings FOLDER_OF_PHOTOS [--count 64] [--batch-size 16] [--threads 2] [--device cpu]

The Pillow loop decodes one PNG, turns it into a tensor and runs the same network on it. "Network alone" runs the network
on tensors that are already on the device, in batches of the stage's size. The stage reads its Parquet shards, decodes,
embeds and writes its table. Loading the weights is not timed. The contestants take turns on the same patches, so that
other load on the machine slows all of them; ratios are medians over the turns.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from ddsr_core.config import Runtime
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.image_sets import write_image_parquet
from ddsr_core.imaging.images import encode_png, to_float
from ddsr_core.imaging.photos import find_images
from ddsr_core.pseudo_labels import embeddings
from ddsr_core.pseudo_labels.config import EmbeddingsConfig
from ddsr_core.pseudo_labels.embedders import load_embedder

FIELDS = {"patch_id": pa.string(), "photo": pa.string(), "psnr_bic": pa.float32()}


def crops(photos: Path, count: int, side: int) -> list[np.ndarray]:
    """The first ``count`` windows of the photos, in a grid without gaps."""
    windows: list[np.ndarray] = []
    for path in find_images(photos):
        photo = read_rgb(path)
        for y in range(0, photo.shape[0] - side + 1, side):
            for x in range(0, photo.shape[1] - side + 1, side):
                windows.append(np.ascontiguousarray(photo[y : y + side, x : x + side]))
                if len(windows) == count:
                    return windows
    raise SystemExit(f"the photos hold only {len(windows)} crops of {side} px")


def single_patches(pngs: list[bytes], network: torch.nn.Module, device: str) -> None:
    """The Pillow loop."""
    with torch.inference_mode():
        for png in pngs:
            image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
            network(torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float().div(255).to(device)).cpu()


def network_alone(batches: list[torch.Tensor], network: torch.nn.Module) -> None:
    """The upper bound on the rate."""
    with torch.inference_mode():
        for batch in batches:
            network(batch).cpu()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--patch-px", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    embeddings.DECODERS = options.threads
    config = EmbeddingsConfig(backend="vgg16", batch_size=options.batch_size)
    network = load_embedder(config, options.device)
    embeddings.load_embedder = lambda *_: network

    images = crops(options.photos, options.count, options.patch_px)
    pngs = [encode_png(image, level=1) for image in images]
    starts = range(0, len(images), config.batch_size)
    batches = [to_float(np.stack(images[at : at + config.batch_size]), options.device) for at in starts]

    with tempfile.TemporaryDirectory() as temporary:
        patches = Path(temporary) / "patches"
        rows = ({"image": png, "patch_id": str(i), "photo": "", "psnr_bic": 0.0} for i, png in enumerate(pngs))
        write_image_parquet(patches / "patches-00000.parquet", rows, FIELDS)

        def stage() -> None:
            with tempfile.TemporaryDirectory(dir=temporary) as out:
                embeddings.run(config, patches=patches, out=Path(out), runtime=Runtime(device=options.device))

        contestants: dict[str, Callable[[], None]] = {
            "ddsr, whole stage": stage,
            "single patches, Pillow": lambda: single_patches(pngs, network, options.device),
            "network alone": lambda: network_alone(batches, network),
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
        for turn in range(options.repeats + 1):  # the first turn warms up
            for name, work in contestants.items():
                started = time.perf_counter(), time.process_time()
                work()
                if turn:
                    seconds[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))

    print(f"{len(images)} patches of {options.patch_px} px, batches of {config.batch_size}, "
          f"{options.device}, {options.threads} threads\n")  # fmt: skip
    print(
        "| | wall, patches/s | CPU, ms per patch | rate of ddsr relative to it, wall | in CPU time |\n|---|---|---|---|---|"
    )
    for name, times in seconds.items():
        wall, cpu = (statistics.median(time[clock] for time in times) for clock in (0, 1))
        pairs = list(zip(times, seconds["ddsr, whole stage"], strict=True))
        by_wall, by_cpu = (statistics.median(other[i] / mine[i] for other, mine in pairs) for i in (0, 1))
        print(f"| {name} | {len(images) / wall:.2f} | {cpu / len(images) * 1e3:.0f} | {by_wall:.2f} | {by_cpu:.2f} |")


if __name__ == "__main__":
    main()
