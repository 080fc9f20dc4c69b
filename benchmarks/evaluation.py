"""Time of the five metrics compared with BasicSR's functions and the package ``lpips``, in one process.

    python -m benchmarks.evaluation FOLDER_OF_PHOTOS [--count 100] [--threads 2] [--networks 4] [--clock cpu]

The images of several "networks" (bicubic, blurred more and more) are scored; decoding and upscaling are not timed. The
two contestants take turns every few photos, so that other load slows both. ``basicsr + lpips`` calls every function on
one photo after the other, with all threads inside. ``ddsr`` scores as its stage does: several photos in parallel, and
from the second network on with cached LPIPS features of the HR photos. On a CPU, AlexNet takes most of either time.
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
from torchvision.transforms.functional import gaussian_blur

from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.evaluation.evaluator import Enlarged, Evaluator, ReferenceFeatures, overlapped
from ddsr_core.imaging.bicubic import make_lr, upsample
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.images import to_float, to_uint8
from ddsr_core.imaging.photos import find_images
from ddsr_core.metrics.lpips import lpips_network
from ddsr_core.metrics.spec import DEFAULT_METRICS, METRICS
from ddsr_core.sr.basicsr_compat import import_basicsr

CROP_BORDER = 4
#: Photos between one contestant's turn and the next.
TURN = 4
Scores = tuple[float, ...]


def ours(device: str) -> Callable[[list[Enlarged]], list[Scores]]:
    """The stage's scoring, which caches the features of HR photos."""
    config = EvaluateConfig(crops=0)
    evaluator = Evaluator(lambda lr: upsample(lr, config.scale), config, device, ReferenceFeatures())

    def score(images: list[Enlarged]) -> list[Scores]:
        scored = overlapped(images, lambda image: image, evaluator.score, device)
        return [tuple(row.values[name] for name in DEFAULT_METRICS) for row in scored]

    return score


def theirs(device: str) -> Callable[[list[Enlarged]], list[Scores]]:
    """Pixel metrics of BasicSR and the package lpips, as a user would call them."""
    basicsr = import_basicsr("metrics.psnr_ssim")
    model = lpips_network().to(device)

    @torch.no_grad()
    def score_one(image: Enlarged) -> Scores:
        sr = to_uint8(image.sr)[0]
        pair = sr[..., ::-1], image.hr[..., ::-1], CROP_BORDER  # BGR
        pixel = (
            metric(*pair, test_y_channel=on_y)
            for on_y in (True, False)
            for metric in (basicsr.calculate_psnr, basicsr.calculate_ssim)
        )
        tensors = (torch.from_numpy(each).permute(2, 0, 1)[None].to(device).float() / 255 for each in (sr, image.hr))
        return (*pixel, model(*tensors, normalize=True).item())

    return lambda images: [score_one(image) for image in images]


def enlarged(paths: list[Path], network: int, device: str) -> list[Enlarged]:
    """The photos, reduced and enlarged again by "network" number ``network``."""
    images = []
    for path in paths:
        hr = read_rgb(path)
        hr = np.ascontiguousarray(hr[: hr.shape[0] // 4 * 4, : hr.shape[1] // 4 * 4])
        lr = make_lr(to_float(hr).to(device))
        sr = upsample(lr)
        images.append(Enlarged(path.name, hr, lr, gaussian_blur(sr, [5, 5], [0.3 * network]) if network else sr))
    return images


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--networks", type=int, default=4, help="how many are evaluated on the same photos")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: all threads' time, on a busy machine")
    options = parser.parse_args(arguments)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    warnings.simplefilter("ignore")

    contestants = {"ddsr": ours(options.device), "basicsr + lpips": theirs(options.device)}
    seconds: dict[tuple[str, int], list[float]] = {(name, n): [] for name in contestants for n in range(options.networks)}
    worst = np.zeros(len(DEFAULT_METRICS))
    paths = find_images(options.photos)[: options.count]
    for score in [ours(options.device), contestants["basicsr + lpips"]]:  # warm up; these features are not reused
        score(enlarged(paths[:1], 0, options.device))
    for network in range(options.networks):
        for begin in range(0, len(paths), TURN):
            images = enlarged(paths[begin : begin + TURN], network, options.device)
            results = []
            for name, score in contestants.items():
                started = clock()
                results.append(np.array(score(images)))
                seconds[name, network].append((clock() - started) / len(images))
            worst = np.maximum(worst, np.abs(results[0] - results[1]).max(0))

    how = f"{options.device}, {options.threads} threads, {options.clock} time"
    print(f"{len(paths)} photos, {how}; median ms per photo, and the ratio of total times\n")
    print("| | ddsr | basicsr + lpips, sequentially | ratio |\n|---|---|---|---|")
    numbers = range(options.networks)
    rows = {"first network": numbers[:1], "each further one": numbers[1:], f"{len(numbers)} networks": numbers}
    for title, networks in rows.items():
        mine, peer = ([t for n in networks for t in seconds[name, n]] for name in contestants)
        if mine:
            medians = f"{statistics.median(mine) * 1e3:.1f} | {statistics.median(peer) * 1e3:.1f}"
            print(f"| {title} | {medians} | {sum(peer) / sum(mine):.2f} |")
    print(
        "\nlargest difference: "
        + ", ".join(f"{METRICS[name].label} {value:.1e}" for name, value in zip(DEFAULT_METRICS, worst, strict=True))
    )


if __name__ == "__main__":
    main()
