"""Run ddsr's training step on a machine that has PyTorch and NumPy but none of ddsr's other dependencies.

`install` provides stand-ins for pydantic, safetensors and others if they are absent. They hold values and validate nothing,
which is enough to time code whose configs are written in the benchmark itself. Do not use them outside of benchmarks.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: Packages that ddsr's step imports when it is loaded but does not use when it runs.
REPLACED = ("pydantic", "safetensors", "pyarrow", "PIL", "sklearn", "lancedb", "cv2", "threadpoolctl", "tomli_w", "filelock")
#: Modules of ddsr that use such a package when they are loaded. The step uses nothing of them.
NEEDED_BY = {"PIL": ("ddsr_core.imaging.decode",)}
MISSING = object()


class Fields:
    """pydantic.BaseModel without validation: declared fields become attributes, with their defaults."""

    def __init__(self, **given: Any) -> None:
        declared = {name for kind in type(self).__mro__ for name in inspect.get_annotations(kind)}
        values = {name: getattr(type(self), name, MISSING) for name in declared} | given
        if wrong := sorted(name for name, value in values.items() if value is MISSING or name not in declared):
            raise TypeError(f"{type(self).__name__}: not given, or not declared: {', '.join(wrong)}")
        self.__dict__.update(values)


def field(default: Any = MISSING, **_: Any) -> Any:
    return default


def keep_function(*_: Any, **__: Any) -> Callable[[Any], Any]:
    """A decorator factory whose decorator returns the function unchanged."""
    return lambda function: function


class StandIn(ModuleType):
    """Has every name, so that ``from x import y`` succeeds; unknown names are exception classes that are never raised."""

    known: dict[str, Any] = {  # noqa: RUF012
        "BaseModel": Fields,
        "ConfigDict": dict,
        "Field": field,
        "field_validator": keep_function,
        "model_validator": keep_function,
    }

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.known.get(name) or type(name, (Exception,), {})


class StandInFinder(MetaPathFinder, Loader):
    """Finds a stand-in for each of ``packages``, and for every module inside it."""

    def __init__(self, packages: Collection[str]) -> None:
        self.packages = packages

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] in self.packages else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """A stand-in has no code."""


def install() -> list[str]:
    """Install the stand-ins; returns the names of the absent packages."""
    absent = [name for name in REPLACED if importlib.util.find_spec(name) is None]
    sys.meta_path.append(StandInFinder(absent))
    for package in absent:
        for name in NEEDED_BY.get(package, ()):
            sys.modules[name] = StandIn(name)
    return absent
