"""Choosing the device without paying for torch where there is no GPU to choose."""

from __future__ import annotations

from pathlib import Path

from ddsr_core.config import resolve_device


def resolve_device_lazily(name: str) -> str:
    """``auto`` needs torch, which takes seconds to import: a machine without an NVIDIA device needs no look."""
    if name == "auto" and not any(Path("/dev").glob("nvidia[0-9]*")) and Path("/proc").is_dir():
        return "cpu"
    return resolve_device(name)
