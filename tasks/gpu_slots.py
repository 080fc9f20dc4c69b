"""At most as many GPU jobs at once, over all machines, as `ddsr deploy --gpus` says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from prefect.concurrency.sync import concurrency

#: The limit that `ddsr deploy` sets to the number of GPUs. Its slots are leases: those of a killed run expire.
GPU_SLOTS = "ddsr-gpu"


def gpu_slot(device: str) -> AbstractContextManager[None]:
    """One of the slots of `GPU_SLOTS` while work goes on there; nothing on a CPU."""
    return concurrency(GPU_SLOTS) if device.startswith("cuda") else nullcontext()
