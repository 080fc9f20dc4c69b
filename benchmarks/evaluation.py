"""Time of the five metrics against BasicSR's functions and the package ``lpips``, photo by photo, in one process.

    python benchmarks/evaluation.py FOLDER_OF_PHOTOS [--count 100] [--threads 2] [--clock cpu]

The two take turns on every photo, so that a busy machine slows both. Decoding and enlarging (bicubic) are not timed. On
a CPU most of either time is AlexNet; both get the same number of threads.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch

from ddsr_core.basicsr_compat import import_basicsr
from ddsr_core.bicubic import make_lr, upsample
from ddsr_core.images import find_images, read_rgb, to_float, to_uint8
from ddsr_core.lpips_metric import LpipsAlex
from ddsr_core.metrics import fidelity

CROP_BORDER = 4
Scores = tuple[float, ...]
Metric = Callable[[np.ndarray, np.ndarray], Scores]


def ours(device: str) -> tuple[Metric, Metric]:
    """Pixel metrics and LPIPS of ddsr."""
    lpips_alex = LpipsAlex(device)

    def tensor(image: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(image).permute(2, 0, 1)[None].to(device)

    def pixel(sr: np.ndarray, hr: np.ndarray) -> Scores:
        return tuple(value.item() for value in fidelity(tensor(sr), tensor(hr), crop_border=CROP_BORDER))

    def perceptual(sr: np.ndarray, hr: np.ndarray) -> Scores:
        return (lpips_alex(tensor(sr), tensor(hr)).item(),)

    return pixel, perceptual


def theirs(device: str) -> tuple[Metric, Metric]:
    """Pixel metrics of BasicSR and the package lpips, as a user would call them."""
    basicsr = import_basicsr("metrics.psnr_ssim")
    model = LpipsAlex(device)._model.to(memory_format=torch.contiguous_format)

    def pixel(sr: np.ndarray, hr: np.ndarray) -> Scores:
        pair = sr[..., ::-1], hr[..., ::-1], CROP_BORDER  # BGR
        return tuple(
            metric(*pair, test_y_channel=on_y)
            for on_y in (True, False)
            for metric in (basicsr.calculate_psnr, basicsr.calculate_ssim)
        )

    @torch.no_grad()
    def perceptual(sr: np.ndarray, hr: np.ndarray) -> Scores:
        pair = (torch.from_numpy(image).permute(2, 0, 1)[None].to(device).float() / 255 for image in (sr, hr))
        return (model(*pair, normalize=True).item(),)

    return pixel, perceptual


def columns(seconds: dict[tuple[str, str], list[float]], part: str, name: str) -> list[list[float]]:
    """Times of one contestant for one part, or for both where ``part`` is "all"."""
    return [times for key, times in seconds.items() if key[1] == name and part in (key[0], "all")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a machine that is busy")
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    torch.set_num_threads(arguments.threads)
    cv2.setNumThreads(arguments.threads)
    warnings.simplefilter("ignore")

    contestants = {"ddsr": ours(arguments.device), "basicsr + lpips": theirs(arguments.device)}
    seconds: dict[tuple[str, str], list[float]] = {}
    worst = [0.0] * 5
    paths = find_images(arguments.photos)[: arguments.count]
    for index, path in enumerate([paths[0], *paths]):  # the first photo comes twice: to warm up
        hr = read_rgb(path)
        hr = np.ascontiguousarray(hr[: hr.shape[0] // 4 * 4, : hr.shape[1] // 4 * 4])
        sr = to_uint8(upsample(make_lr(to_float(hr))))[0]
        results: dict[str, Scores] = {}
        for name, (pixel, perceptual) in contestants.items():
            for part, metric in (("PSNR and SSIM", pixel), ("LPIPS", perceptual)):
                started = clock()
                results[name] = results.get(name, ()) + metric(sr, hr)
                if index:
                    seconds.setdefault((part, name), []).append(clock() - started)
        differences = zip(*results.values(), strict=True)
        worst = [max(most, abs(a - b)) for most, (a, b) in zip(worst, differences, strict=True)]

    print(
        f"{len(paths)} photos, {arguments.device}, {arguments.threads} threads; median ms a photo ({arguments.clock} time)\n"
    )
    print("| part | ddsr | basicsr + lpips | ratio of sums |\n|---|---|---|---|")
    for part in ("PSNR and SSIM", "LPIPS", "all"):
        times = {name: [sum(pair) for pair in zip(*columns(seconds, part, name), strict=True)] for name in contestants}
        mine, peer = times["ddsr"], times["basicsr + lpips"]
        medians = f"{statistics.median(mine) * 1e3:.1f} | {statistics.median(peer) * 1e3:.1f}"
        print(f"| {part} | {medians} | {sum(peer) / sum(mine):.2f} |")
    labels = ("PSNR-Y", "SSIM-Y", "PSNR-RGB", "SSIM-RGB", "LPIPS")
    print("\nlargest difference: " + ", ".join(f"{name} {value:.1e}" for name, value in zip(labels, worst, strict=True)))


if __name__ == "__main__":
    main()
