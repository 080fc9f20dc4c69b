"""What a worker process does first: take its share of the cores, and watch the process that started it."""

from __future__ import annotations

import os
import sys
import threading
import time

PARENT_CHECK_S = 1.0


def begin_worker(workers: int, parent: int) -> None:
    """Take a share of the cores, and end when the command that started it has ended, however it did.

    Args:
        workers: processes that share the cores.
        parent: process id.
    """
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for torch, if it is imported at all
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)


def end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)  # nobody waits for what it does; what it has begun goes on in the next run
