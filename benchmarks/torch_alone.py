"""Run ddsr's training step on a machine that has PyTorch and NumPy but none of ddsr's other dependencies.

`install` provides stand-ins for pydantic, safetensors and others if they are absent. They hold values and validate nothing,
which is enough to time code whose configs are written in the benchmark itself. Do not use them outside of benchmarks.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

#: Modules that ddsr's step imports when it is loaded but does not use when it runs.
REPLACED = (
    "pydantic", "safetensors", "safetensors.torch", "pyarrow", "pyarrow.parquet", "PIL",
)  # fmt: skip
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


def install() -> list[str]:
    """Install the stand-ins; returns the names of the absent packages."""
    roots = dict.fromkeys(name.split(".")[0] for name in REPLACED)
    absent = [name for name in roots if importlib.util.find_spec(name) is None]
    for name in REPLACED:
        if name.split(".")[0] in absent:
            sys.modules[name] = StandIn(name)
    return absent
