"""Dataset distillation for super-resolution: the library (Python and PyTorch, no Prefect).

The functions of `ddsr_core.api` are here, too: ``ddsr_core.distill``, ``train``, ``evaluate``, ``upscale`` and others. The
stages stand in `ddsr_core.stages`, in the order of the paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ddsr_core.threads import shorten_spin

if TYPE_CHECKING:  # `__getattr__` hides the types
    from ddsr_core.api import (
        demo_photos,
        distill,
        evaluate,
        list_runs,
        load_distilled,
        preset_config,
        reproduce,
        search,
        train,
        upscale,
    )

__version__ = "0.1.0"
__all__ = ["demo_photos", "distill", "evaluate", "list_runs", "load_distilled", "preset_config", "reproduce", "search",
           "train", "upscale"]  # fmt: skip

shorten_spin()


def __getattr__(name: str) -> Any:
    if name in __all__:
        from ddsr_core import api  # imports torch, which takes seconds: only for who asks for it

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
