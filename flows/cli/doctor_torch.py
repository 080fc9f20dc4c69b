"""The checks of `ddsr doctor` that need torch: shipped weights and the device."""

from __future__ import annotations

import os

import torch

from ddsr_core.diffusion.base import TINY, locate_base
from ddsr_core.errors import DdsrError
from ddsr_core.metrics.trunks import FIX, weights_file
from flows.cli.checks import Check


def weights_and_device() -> list[Check]:
    """Check the shipped base model, the trunks of LPIPS and VGG16, and the device."""
    return [_base(), _trunk("alex", "LPIPS"), _trunk("vgg16", "embeddings without a hub"), _device()]


def _base() -> Check:
    try:
        return Check("ok", f"base model {TINY}", str(locate_base(TINY)))
    except DdsrError as error:
        return Check("FAIL", f"base model {TINY}", error.what, error.fix or "")


def _trunk(net: str, use: str) -> Check:
    try:
        return Check("ok", f"{net} trunk ({use})", str(weights_file(net)))  # type: ignore[arg-type]
    except DdsrError as error:
        return Check("FAIL", f"{net} trunk ({use})", error.what, FIX)


def _device() -> Check:
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return Check("ok", "device", f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB")
    fix = "Use --preset demo, which takes minutes on a CPU; the other presets need a GPU."
    return Check("warn", "device", f"no GPU; {os.cpu_count()} CPU cores", fix)
