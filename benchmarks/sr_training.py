"""Time of a training step compared with BasicSR's own loop: same network, crops, batch and cores, in one process.

    python -m benchmarks.sr_training FOLDER_OF_PHOTOS [--network rcan] [--batch 4] [--threads 2] [--clock cpu]

The two take turns step by step, so that other load slows both. BasicSR's side is one iteration of its ``train.py``:
``CPUPrefetcher`` over a ``DataLoader`` of ``PairedImageDataset`` on PNG sub-images on disk, then
``SRModel.update_learning_rate``, ``feed_data`` and ``optimize_parameters`` with Adam and EMA. Its loader has no workers:
they would decode while the other side is timed, and on a CPU there are no spare cores for them.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddsr_core.imaging.bicubic import make_lr
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.images import save_png, to_float, to_uint8
from ddsr_core.imaging.photos import find_images
from ddsr_core.sr import train_sr
from ddsr_core.sr.architectures import find_architecture
from ddsr_core.sr.basicsr_compat import import_basicsr
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.data import batches, pack_pairs
from ddsr_core.sr.plan import plan_of
from ddsr_core.sr.state import new_state
from ddsr_core.sr.train_sr import train_step

SUB_IMAGE_PX = 480
PARTS = ("data", "forward and backward", "optimizer", "EMA")
#: BasicSR's options for the networks that ddsr has under the same name.
NETWORKS: dict[str, dict[str, Any]] = {
    "edsr": {"type": "EDSR", "num_feat": 64, "num_block": 16},
    "rcan": {"type": "RCAN", "num_feat": 64, "num_group": 10, "num_block": 20},
}
Clock = Callable[[], float]


class Watch:
    """Adds up the time of named parts of a step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.steps: list[dict[str, float]] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            started = self.clock()
            result = function(*arguments, **options)
            self.steps[-1][part] += self.clock() - started
            return result

        return wrapped

    def step(self, work: Callable[[], None]) -> None:
        """Run one step; time outside the named parts counts as forward and backward."""
        self.steps.append(dict.fromkeys(PARTS, 0.0))
        started = self.clock()
        work()
        parts = self.steps[-1]
        parts["forward and backward"] = self.clock() - started - sum(parts.values())

    def median(self, part: str) -> float:
        """Milliseconds; the first step warms up and does not count."""
        steps = self.steps[1:]
        return 1e3 * statistics.median(sum(step.values()) if part == "step" else step[part] for step in steps)


def write_sub_images(photos: Path, folder: Path, count: int) -> None:
    """PNG crops in ``HR`` and ``LRx4``, as BasicSR's preparation script leaves them."""
    made = 0
    for path in find_images(photos):
        if made >= count:
            return
        hr = read_rgb(path)
        for y in range(0, hr.shape[0] - SUB_IMAGE_PX + 1, SUB_IMAGE_PX):
            for x in range(0, hr.shape[1] - SUB_IMAGE_PX + 1, SUB_IMAGE_PX):
                crop = np.ascontiguousarray(hr[y : y + SUB_IMAGE_PX, x : x + SUB_IMAGE_PX])
                save_png(folder / f"HR/{made:04d}.png", crop)
                save_png(folder / f"LRx4/{made:04d}.png", to_uint8(make_lr(to_float(crop)))[0])
                made += 1
    if made < count:
        raise SystemExit(f"{photos}: {made} crops of {SUB_IMAGE_PX} px, {count} needed; name a folder with larger photos")


def basicsr_step(network: dict[str, Any], data: Path, arguments: argparse.Namespace, watch: Watch) -> Callable[[], None]:
    """One iteration of BasicSR's ``train.py``."""
    loading = import_basicsr("data")
    prefetching = import_basicsr("data.prefetch_dataloader")
    model_class = import_basicsr("models.sr_model").SRModel
    logging.getLogger("basicsr").setLevel(logging.ERROR)
    options = {
        "name": "benchmark", "type": "PairedImageDataset", "phase": "train", "scale": 4,
        "dataroot_gt": str(data / "HR"), "dataroot_lq": str(data / "LRx4"), "io_backend": {"type": "disk"},
        "gt_size": arguments.patch * 4, "use_hflip": True, "use_rot": True,
        "batch_size_per_gpu": arguments.batch, "num_worker_per_gpu": 0,
    }  # fmt: skip
    dataset = loading.build_dataset(options)
    prefetcher = prefetching.CPUPrefetcher(loading.build_dataloader(dataset, options, num_gpu=0, seed=0))
    model = model_class(
        {
            "num_gpu": 0, "is_train": True, "dist": False, "scale": 4, "path": {},
            "network_g": {**network, "num_in_ch": 3, "num_out_ch": 3, "upscale": 4},
            "train": {
                "ema_decay": 0.999,
                "optim_g": {"type": "Adam", "lr": 1e-4, "weight_decay": 0, "betas": [0.9, 0.99]},
                "scheduler": {"type": "MultiStepLR", "milestones": [200_000], "gamma": 0.5},
                "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
            },
        }
    )  # fmt: skip
    model.optimizer_g.step = watch.timed("optimizer", model.optimizer_g.step)
    model.model_ema = watch.timed("EMA", model.model_ema)
    taken = iter(range(1, 10**9))

    def fetch() -> dict[str, Any]:
        batch = prefetcher.next()
        if batch is None:  # an epoch is over
            prefetcher.reset()
            batch = prefetcher.next()
        return batch

    fetch = watch.timed("data", fetch)

    def work() -> None:
        number = next(taken)
        model.update_learning_rate(number, warmup_iter=-1)
        model.feed_data(fetch())
        model.optimize_parameters(number)
        model.get_current_log()["l_pix"]

    return work


def ddsr_step(config: TrainSRConfig, data: Path, folder: Path, watch: Watch) -> Callable[[], None]:
    """One iteration of `ddsr_core.sr.train_sr.train`."""
    plan, device = plan_of(config), torch.device("cpu")
    pairs = pack_pairs(data / "HR", folder, plan.lr_patch_px)
    state = new_state(config, "cpu")
    bf16 = config.precision == "bf16" and find_architecture(config.arch).bf16_on_cpu
    feed: Iterator = batches(pairs, config.seed, range(config.iterations), plan.batch_size, device)
    fetch = watch.timed("data", lambda: next(feed))
    state.optimizer.step = watch.timed("optimizer", state.optimizer.step)  # type: ignore[method-assign]
    train_sr.update_ema = watch.timed("EMA", train_sr.update_ema)  # type: ignore[attr-defined]

    def work() -> None:
        train_step(config, state, *fetch(), bf16).tolist()
        state.step += 1

    return work


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--network", choices=sorted(NETWORKS), default="edsr")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--patch", type=int, default=48, help="LR pixels")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.clock == "wall" else time.process_time

    config = TrainSRConfig(
        arch=options.network, iterations=10**6, batch_size=options.batch, lr_patch_px=options.patch,
        precision=options.precision, compile=options.compile,
    )  # fmt: skip
    watches = {"ddsr": Watch(clock), "BasicSR": Watch(clock)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_sub_images(options.photos, folder / "data", count=2 * options.batch)
        steps = {
            "ddsr": ddsr_step(config, folder / "data", folder / "packed", watches["ddsr"]),
            "BasicSR": basicsr_step(NETWORKS[options.network], folder / "data", options, watches["BasicSR"]),
        }
        for _ in range(1 + options.steps):
            for name, work in steps.items():
                watches[name].step(work)

    what = f"{options.network}, batch {options.batch}, LR {options.patch} px, {options.threads} threads"
    print(f"{what}; median ms of {options.steps} steps ({options.clock} time)\n")
    print("| part | ddsr | BasicSR | ratio |\n|---|---|---|---|")
    for part in (*PARTS, "step"):
        mine, peer = watches["ddsr"].median(part), watches["BasicSR"].median(part)
        print(f"| {part} | {mine:.1f} | {peer:.1f} | {peer / mine:.2f} |")


if __name__ == "__main__":
    main()
