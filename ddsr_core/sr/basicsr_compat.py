"""The only place that imports basicsr 1.4.2, whose import fails on torchvision >= 0.17.

basicsr imports ``torchvision.transforms.functional_tensor.rgb_to_grayscale``, a module that torchvision has removed. The
function still exists in ``torchvision.transforms.functional``, so a stub module provides it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

_REMOVED = "torchvision.transforms.functional_tensor"


def import_basicsr(module: str) -> types.ModuleType:
    """Import ``basicsr.<module>``, for example ``import_basicsr("archs.edsr_arch").EDSR``.

    Raises:
        ImportError: basicsr or torchvision is not installed.
    """
    if _REMOVED not in sys.modules and importlib.util.find_spec(_REMOVED) is None:
        functional = importlib.import_module("torchvision.transforms.functional")
        stub = types.ModuleType(_REMOVED)
        stub.rgb_to_grayscale = functional.rgb_to_grayscale  # type: ignore[attr-defined]
        sys.modules[_REMOVED] = stub
    return importlib.import_module(f"basicsr.{module}")
