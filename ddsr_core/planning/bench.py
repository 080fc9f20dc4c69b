"""Rates of this machine, measured: what a plan is timed by once ``ddsr bench`` has run."""

from __future__ import annotations

import gc
import io
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tomli_w
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

from ddsr_core.imaging.images import encode_png
from ddsr_core.planning.config import HostRates, Machine, Rates, read_machine
from ddsr_core.pseudo_labels.config import PatchesConfig
from ddsr_core.pseudo_labels.windows import score_windows
from ddsr_core.storage.files import write_atomically

GIB = 2**30
#: Each measurement is repeated this often, after one that does not count; the median counts.
REPEATS = 5

Clock = Callable[[], float]


def rates_file(home: Path, device: str) -> Path:
    """Where the rates of a device of this machine are kept: ``<home>/rates/cpu.toml`` or ``cuda.toml``."""
    return home / "rates" / f"{torch.device(device).type}.toml"


def measured_machine(home: Path, device: str) -> Machine | None:
    """This machine as ``ddsr bench`` has measured it; None if it has not.

    Raises:
        ConfigError: the file is damaged.
    """
    file = rates_file(home, device)
    return read_machine(file) if file.is_file() else None


def save_machine(machine: Machine, home: Path) -> Path:
    """Keep the rates in the home; returns the file."""
    file = rates_file(home, machine.device)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, tomli_w.dumps(machine.model_dump(mode="json", exclude_none=True)).encode())
    return file


def measure_machine(device: str = "cpu", clock: Clock = time.perf_counter, cores: int | None = None) -> Machine:
    """Measure a device and its host: about half a minute on a CPU.

    Args:
        clock: ``time.process_time`` on one thread leaves other programs' work out.
        cores: of the host that handle images; None: all.
    """
    kind = torch.device(device).type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    total = torch.cuda.get_device_properties(device).total_memory if kind == "cuda" else _host_bytes()
    host = measure_host(clock, cores or len(os.sched_getaffinity(0)))
    return Machine(
        name=name, device="cuda" if kind == "cuda" else "cpu", memory_gib=round(total / GIB, 2), origin="measured",
        note=f"torch {torch.__version__}, {torch.get_num_threads()} threads", rates=measure_rates(device, clock), host=host,
    )  # fmt: skip


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure_rates(device: str, clock: Clock) -> Rates:
    """Rates of torch's operators on a device."""
    on_gpu = torch.device(device).type == "cuda"
    timed = _Timer(device, clock)
    size, channels, side, tokens = (8192, 256, 64, 1024) if on_gpu else (512, 48, 64, 256)
    values = {}
    for suffix, dtype in (("", torch.float32), ("_half", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        values[f"matmul{suffix}"] = 2 * size**3 / timed(lambda a=a, b=b: a @ b)  # type: ignore[misc]
        values[f"conv{suffix}"] = _conv_rate(timed, device, dtype, channels, side)
        q = torch.randn(8, 16, tokens, 64, device=device, dtype=dtype)
        flops = 4 * 8 * 16 * tokens**2 * 64
        values[f"attention{suffix}"] = flops / timed(lambda q=q: F.scaled_dot_product_attention(q, q, q))  # type: ignore[misc]
    large = torch.randn(2**26 if on_gpu else 2**21, device=device)
    values["bandwidth"] = 3 * 4 * len(large) / timed(lambda: large + large)
    small = torch.zeros(16, device=device)
    values["launch"] = timed(lambda: [small + small for _ in range(1000)]) / 1000
    return Rates(**values)


def _conv_rate(timed: _Timer, device: str, dtype: torch.dtype, channels: int, side: int) -> float:
    """A 3x3 convolution, forward and backward, as SR networks have it."""
    x = torch.randn(16, channels, side, side, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    flops = 3 * 2 * 16 * side**2 * channels**2 * 9

    def step() -> Tensor:
        out = F.conv2d(x, weight, padding=1)
        torch.autograd.grad(out, (x, weight), out.detach())
        return out

    return flops / timed(step)


class _Timer:
    """Median seconds of a call, the device waited for."""

    def __init__(self, device: str, clock: Clock) -> None:
        self.device, self.clock = torch.device(device), clock

    def __call__(self, work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(REPEATS + 1):
            gc.collect()
            begun = self.clock()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(self.clock() - begun)
        return max(statistics.median(seconds[1:]), 1e-9)


def measure_host(clock: Clock, cores: int) -> HostRates:
    """Rates of one core on images: a textured photo of one megapixel."""
    timed = _Timer("cpu", clock)
    photo = textured(1024, 1024)
    mega = photo.shape[0] * photo.shape[1] / 1e6
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "JPEG", quality=92)
    png, jpeg = encode_png(photo), buffer.getvalue()
    config = PatchesConfig(patch_px=512, stride_px=256)
    vectors = np.random.default_rng(0).standard_normal((4000, 512)).astype(np.float32)
    with threadpool_limits(1):
        kmeans = KMeans(7, n_init=1, max_iter=10, random_state=0)
        seconds = timed(lambda: kmeans.fit(vectors))
        return HostRates(
            cores=cores,
            jpeg_decode=mega / timed(lambda: np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))),
            score=mega / timed(lambda: score_windows(photo, config)),
            png_encode=mega / timed(lambda: encode_png(photo)),
            png_decode=mega / timed(lambda: np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))),
            kmeans=2 * 4000 * 7 * 512 * kmeans.n_iter_ / seconds,
        )


def textured(height: int, width: int) -> np.ndarray:
    """A picture that compresses like a photo of foliage: noise of all sizes, ``uint8 (height, width, 3)``."""
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(1, 3, height, width)
    for octave in range(6):
        noise = torch.randn(1, 3, height >> octave, width >> octave, generator=generator)
        image += F.interpolate(noise, size=(height, width), mode="bilinear") * 2.0**octave
    return np.asarray((image * 6 + 128).clamp(0, 255).byte()[0].permute(1, 2, 0).numpy())
