"""Real-ESRGAN's second-order degradation (Wang et al., ICCVW 2021, section 3), computed by basicsr.

Blur, resizing, noise and JPEG, twice, in random order and strength, with the probabilities and ranges of the published
x4plus training. One thing differs: basicsr mixes the crops of many steps in a pool, which a resumable training cannot.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddsr_core.errors import InputError
from ddsr_core.sr.basicsr_compat import import_basicsr
from ddsr_core.sr.config import Degradation

#: Blur kernels are padded to this side; images must be larger than half of it at every stage.
KERNEL_PX = 21
_SMALLEST_RESIZE = 0.15
_FIRST = {
    "resize_prob": [0.2, 0.7, 0.1], "resize_range": [_SMALLEST_RESIZE, 1.5], "gaussian_noise_prob": 0.5,
    "noise_range": [1, 30], "poisson_scale_range": [0.05, 3], "gray_noise_prob": 0.4, "jpeg_range": [30, 95],
}  # fmt: skip
_SECOND = {
    "second_blur_prob": 0.8, "resize_prob2": [0.3, 0.4, 0.3], "resize_range2": [0.3, 1.2], "gaussian_noise_prob2": 0.5,
    "noise_range2": [1, 25], "poisson_scale_range2": [0.05, 2.5], "gray_noise_prob2": 0.4, "jpeg_range2": [30, 95],
}  # fmt: skip
_SINC, _FINAL_SINC = 0.1, 0.8
#: Largest deviation of the Gaussian kernels, first and second blur.
_SIGMAS = (3.0, 1.5)
_KERNELS = {
    "iso": 0.45, "aniso": 0.25, "generalized_iso": 0.12, "generalized_aniso": 0.03, "plateau_iso": 0.12,
    "plateau_aniso": 0.03,
}  # fmt: skip


class RealEsrganDegradation:
    """Makes LR images from HR images.

    Args:
        scale: factor by which LR images are smaller.
        device: torch device of the images.
    """

    def __init__(self, scale: int, device: str) -> None:
        model_class = import_basicsr("models.realesrgan_model").RealESRGANModel
        self._model = _without_pool(model_class)
        self._model.opt = {**_FIRST, **_SECOND, "scale": scale}
        self._model.is_train, self._model.device = True, torch.device(device)
        jpeg = import_basicsr("utils").DiffJPEG(differentiable=False).to(device)
        # contiguous, because basicsr takes views of what is channels-last in newer versions of torch
        self._model.jpeger = lambda image, quality: jpeg(image, quality=quality).contiguous()
        self._model.usm_sharpener = import_basicsr("utils.img_process_util").USMSharp().to(device)
        self._kernels = import_basicsr("data.degradations")
        self.scale, self.device = scale, torch.device(device)

    @torch.no_grad()
    def __call__(self, hr: Tensor, seed: Sequence[int]) -> Tensor:
        """LR images of a batch. Resizing, noise and JPEG order are sampled once per batch, blur once per image.

        Args:
            hr: float32 (B, 3, H, W) in [0, 1]; H and W are multiples of the scale, and at least `smallest_px`.
            seed: all random numbers depend on it alone.

        Returns:
            float32 (B, 3, H / scale, W / scale) in [0, 1], every value a multiple of 1/255.

        Raises:
            InputError: the images are too small.
        """
        if min(hr.shape[-2:]) < smallest_px(self.scale):
            raise InputError(
                f"too small for the degradation: {hr.shape[-1]}x{hr.shape[-2]}",
                fix=f"use HR images or crops of at least {smallest_px(self.scale)} px",
            )
        with _seeded(seed, self.device):
            kernels = [(self._blur(_SIGMAS[0]), self._blur(_SIGMAS[1]), self._final_sinc()) for _ in range(len(hr))]
            first, second, sinc = (torch.from_numpy(np.stack(some)).float() for some in zip(*kernels, strict=True))
            self._model.opt["gt_size"], self._model.made = min(hr.shape[-2:]), []
            plain = hr.contiguous(memory_format=torch.contiguous_format)  # basicsr takes views of it
            self._model.feed_data({"gt": plain, "kernel1": first, "kernel2": second, "sinc_kernel": sinc})
        lr: Tensor = self._model.lq
        return lr.contiguous(memory_format=torch.channels_last)

    def _blur(self, sigma: float) -> np.ndarray:
        """A random blur kernel, (21, 21)."""
        px = random.choice(range(7, KERNEL_PX + 1, 2))
        if np.random.uniform() < _SINC:
            return self._sinc(px, math.pi / 3 if px < 13 else math.pi / 5)
        kernel = self._kernels.random_mixed_kernels(
            list(_KERNELS), list(_KERNELS.values()), px, [0.2, sigma], [0.2, sigma], [-math.pi, math.pi], [0.5, 4], [1, 2],
            noise_range=None,
        )  # fmt: skip
        return np.pad(kernel, (KERNEL_PX - px) // 2)

    def _final_sinc(self) -> np.ndarray:
        if np.random.uniform() < _FINAL_SINC:
            return self._sinc(random.choice(range(7, KERNEL_PX + 1, 2)), math.pi / 3)
        pulse = np.zeros((KERNEL_PX, KERNEL_PX))
        pulse[KERNEL_PX // 2, KERNEL_PX // 2] = 1
        return pulse

    def _sinc(self, px: int, lowest: float) -> np.ndarray:
        kernel: np.ndarray = self._kernels.circular_lowpass_kernel(np.random.uniform(lowest, math.pi), px, pad_to=KERNEL_PX)
        return kernel


def degrader_of(kind: Degradation, scale: int, device: str) -> RealEsrganDegradation | None:
    """The degradation that replaces MATLAB's bicubic reduction; None for ``bicubic``."""
    return RealEsrganDegradation(scale, device) if kind == "real-esrgan" else None


def smallest_px(scale: int) -> int:
    """Smallest side of an HR image: the blurs need half a kernel beside every pixel even at the smallest size.

    >>> smallest_px(4), smallest_px(2)
    (74, 74)
    """
    margin = KERNEL_PX // 2 + 1
    return max(math.ceil(margin / _SMALLEST_RESIZE), margin * scale)


def seed_of(image: np.ndarray) -> tuple[int, ...]:
    """A seed from the pixels of an image, so that a test image is degraded in the same way for every network."""
    return tuple(hashlib.sha256(image.tobytes()).digest()[:8])


@contextmanager
def _seeded(seed: Sequence[int], device: torch.device) -> Iterator[None]:
    """Seed the global generators of the three libraries that basicsr uses, and restore them afterwards."""
    number = int(np.random.SeedSequence(list(seed)).generate_state(1)[0])
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _without_pool(model_class: Any) -> Any:
    """basicsr's model, reduced to `feed_data`, on entire images."""

    class Degrader(model_class):  # type: ignore[misc]
        def __init__(self) -> None:
            self.made: list[Tensor] = []

        @property
        def lq(self) -> Tensor:
            """The LR images. `feed_data` sets the whole images first, and then a square crop."""
            return self.made[0]

        @lq.setter
        def lq(self, images: Tensor) -> None:
            self.made.append(images)

        def _dequeue_and_enqueue(self) -> None:
            pass

    return Degrader()
