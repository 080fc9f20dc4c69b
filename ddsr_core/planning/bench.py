"""Measured rates of this machine. Plans use them once ``ddsr bench`` has run."""

from __future__ import annotations

import io
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import tomli_w
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import lsq_linear
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

from ddsr_core.diffusion.base import TINY
from ddsr_core.diffusion.dit import DiT, DiTConfig
from ddsr_core.imaging.images import encode_png
from ddsr_core.metrics.psnr_ssim import fidelity
from ddsr_core.planning.config import HostRates, Machine, Rates, read_machine
from ddsr_core.planning.counting import Count, counting
from ddsr_core.planning.shapes import base_shape, make_codec, make_embedder
from ddsr_core.pseudo_labels.config import EmbeddingsConfig, PatchesConfig
from ddsr_core.pseudo_labels.windows import score_windows
from ddsr_core.sr.architectures import find_architecture
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.state import new_state
from ddsr_core.sr.train_sr import train_step
from ddsr_core.storage.files import write_atomically

GIB = 2**30
#: Each measurement is repeated this often, after one that does not count; the median counts. A long one is repeated less.
REPEATS, ENOUGH_S = 5, 1.0

Clock = Callable[[], float]
Step = Callable[[], object]


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
    """Store the rates in the home; returns the file."""
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
    """Rates of a device: a fit to the times of `SAMPLES`, none of them above what single large operators reach."""
    timed = _Timer(device, clock)
    best = _best_rates(device, timed)
    rows, seconds = [], []
    for prepare in SAMPLES:
        with counting() as count:
            step = prepare("cpu")
            count.take()
            step()
            rows.append(_terms(count.take()))
        seconds.append(timed(prepare(device)))
    shares = np.array(rows) / np.array(seconds)[:, None]  # relative errors count
    lowest = np.array([1 / getattr(best, name) if name != "launch" else best.launch for name in Rates.model_fields])
    fitted = lsq_linear(shares, np.ones(len(seconds)), bounds=(lowest, lowest * 100)).x
    values = dict(zip(Rates.model_fields, fitted, strict=True))
    return Rates(**{name: value if name == "launch" else 1 / value for name, value in values.items()})


def _terms(count: Count) -> list[float]:
    """Sums of what the time of operators depends on, in the order of the fields of `Rates`."""
    sums = dict.fromkeys(Rates.model_fields, 0.0)
    for op, times in count.ops.items():
        if op.flops:
            sums[op.kind + ("_half" if op.half else "")] += op.flops * times
        sums["bandwidth"] += op.bytes * times
        sums["launch"] += times
    return list(sums.values())


def _best_rates(device: str, timed: _Timer) -> Rates:
    """What single large operators reach."""
    on_gpu = torch.device(device).type == "cuda"
    size, channels, side, tokens = (8192, 256, 64, 1024) if on_gpu else (512, 48, 64, 256)
    values = {}
    for suffix, dtype in (("", torch.float32), ("_half", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        values[f"matmul{suffix}"] = 2 * size**3 / timed(partial(torch.matmul, a, b))
        values[f"conv{suffix}"] = _conv_rate(timed, device, dtype, channels, side)
        q = torch.randn(8, 16, tokens, 64, device=device, dtype=dtype)
        flops = 4 * 8 * 16 * tokens**2 * 64
        values[f"attention{suffix}"] = flops / timed(partial(F.scaled_dot_product_attention, q, q, q))
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


def _sr_step(device: str, arch: str, batch: int, px: int) -> Step:
    """A training step of an SR network."""
    config = TrainSRConfig(arch=arch, iterations=100, batch_size=batch, lr_patch_px=px)
    state = new_state(config, device)
    half = find_architecture(arch).bf16_on_cpu or device != "cpu"
    lr, hr = (torch.rand(batch, 3, side, side, device=device) for side in (px, 4 * px))
    lr, hr = (x.contiguous(memory_format=torch.channels_last) for x in (lr, hr))
    return lambda: train_step(config, state, lr, hr, half)


def _dit(device: str, shape: DiTConfig, batch: int, *, train: bool, half: bool) -> Step:
    """A DiT forward, with the backward pass of its biases in training."""
    model = DiT(shape).to(device).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(train and name.endswith("bias"))
    x = torch.randn(batch, shape.in_channels, shape.latent_px, shape.latent_px, device=device)
    t, y = torch.zeros(batch, device=device), torch.zeros(batch, dtype=torch.long, device=device)

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
            out = model(x, t, y)
        if train:
            out.float().square().mean().backward()

    return step


def _coded(device: str, *, decode: bool) -> Step:
    """The VAE of ddsr-tiny on a batch."""
    codec = make_codec(base_shape(TINY, None).vae)
    codec.vae.to(device)
    x = torch.rand(16, *((4, 16, 16) if decode else (3, 64, 64)), device=device)
    return torch.inference_mode()(lambda: codec.decode(x) if decode else codec.moments(x))  # type: ignore[no-any-return]


def _embedded(device: str) -> Step:
    """VGG16 on a batch of patches."""
    embedder = make_embedder(EmbeddingsConfig(backend="vgg16", image_px=64)).to(device)
    x = torch.rand(16, 3, 64, 64, device=device)
    return torch.inference_mode()(lambda: embedder(x))  # type: ignore[no-any-return]


def _metrics(device: str) -> Step:
    """PSNR and SSIM of a photo, and a network like that of LPIPS on it."""
    from torchvision.models import alexnet  # takes a second to import

    features = alexnet(weights=None).features.to(device).eval()
    sr, hr = (torch.rand(1, 3, 320, 480, device=device) for _ in range(2))

    def step() -> None:
        fidelity(sr, hr, crop_border=4)
        features(sr)
        features(hr)

    return torch.inference_mode()(step)  # type: ignore[no-any-return]


_TINY_DIT = base_shape(TINY, None).dit
#: A block of the width of DiT-XL/2, on the tokens of 256 px.
_WIDE_DIT = DiTConfig(latent_px=32, hidden=1152, depth=1, heads=16)
#: Work like that of the stages, small enough for a processor core.
SAMPLES: tuple[Callable[[str], Step], ...] = (
    partial(_sr_step, arch="edsr-small", batch=16, px=16),
    partial(_sr_step, arch="srformer-small", batch=16, px=16),
    partial(_sr_step, arch="edsr", batch=2, px=32),
    partial(_dit, shape=_TINY_DIT, batch=16, train=True, half=True),
    partial(_dit, shape=_TINY_DIT, batch=14, train=False, half=False),
    partial(_dit, shape=_WIDE_DIT, batch=1, train=False, half=False),
    partial(_dit, shape=_WIDE_DIT, batch=1, train=False, half=True),
    partial(_coded, decode=True),
    partial(_coded, decode=False),
    _embedded,
    _metrics,
)


class _Timer:
    """Median seconds of a call, including the wait for the device."""

    def __init__(self, device: str, clock: Clock) -> None:
        self.device, self.clock = torch.device(device), clock

    def __call__(self, work: Callable[[], object]) -> float:
        seconds: list[float] = []
        while len(seconds) <= REPEATS and sum(seconds[1:]) < ENOUGH_S:
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
