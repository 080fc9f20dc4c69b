"""Run ddsr's training step on a machine that has PyTorch and NumPy and nothing else of ddsr's needs.

`install` puts stand-ins for pydantic, safetensors and others where the real packages are absent. They hold values and check
nothing: enough to time code whose configs are written in the benchmark itself. Not for use outside of benchmarks.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

#: Dotted names that ddsr's step imports when it is loaded, not when it is run.
REPLACED = (
    "pydantic", "safetensors", "safetensors.torch", "pyarrow", "pyarrow.parquet", "PIL",
)  # fmt: skip
MISSING = object()


class Fields:
    """pydantic.BaseModel without validation: declared fields as attributes, defaults for those not given."""

    def __init__(self, **given: Any) -> None:
        declared = {name for kind in type(self).__mro__ for name in inspect.get_annotations(kind)}
        values = {name: getattr(type(self), name, MISSING) for name in declared} | given
        if wrong := sorted(name for name, value in values.items() if value is MISSING or name not in declared):
            raise TypeError(f"{type(self).__name__}: not given, or not declared: {', '.join(wrong)}")
        self.__dict__.update(values)


def field(default: Any = MISSING, **_: Any) -> Any:
    return default


def keep_function(*_: Any, **__: Any) -> Callable[[Any], Any]:
    """A decorator factory whose decorator returns the function as it is."""
    return lambda function: function


class StandIn(ModuleType):
    """Has every name, so that ``from x import y`` succeeds; what is not known by name is an exception nobody raises."""

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
    """Put the stand-ins in place; returns the names of the packages that were absent."""
    roots = dict.fromkeys(name.split(".")[0] for name in REPLACED)
    absent = [name for name in roots if importlib.util.find_spec(name) is None]
    for name in REPLACED:
        if name.split(".")[0] in absent:
            sys.modules[name] = StandIn(name)
    return absent
