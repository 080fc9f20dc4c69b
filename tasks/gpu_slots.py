"""Limits GPU jobs over all machines to the number set by `ddsr deploy --gpus`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from prefect.concurrency.sync import concurrency

#: The limit that `ddsr deploy` sets to the number of GPUs. Its slots are leases: those of a killed run expire.
GPU_SLOTS = "ddsr-gpu"


def gpu_slot(device: str) -> AbstractContextManager[None]:
    """Hold one slot of `GPU_SLOTS` while open; no slot on a CPU."""
    return concurrency(GPU_SLOTS) if device.startswith("cuda") else nullcontext()
