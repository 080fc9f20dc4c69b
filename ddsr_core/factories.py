"""Tables name what they list as ``module:attribute``, so that reading a table loads neither torch nor the module."""

from __future__ import annotations

import importlib
from typing import Any

from ddsr_core.errors import ConfigError


def load_factory(place: str, where: str) -> Any:
    """Import what ``module:attribute`` names.

    Args:
        where: field or table that names it, for the message.

    Raises:
        ConfigError: there is no such module, or no such name in it.

    >>> load_factory("math:hypot", "example")(3, 4)
    5.0
    """
    module, _, attribute = place.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"cannot import {attribute} from {module}: {error}",
            where=where,
            fix="check the spelling of module:name and that the module is on the Python path, "
            "for example PYTHONPATH=. for one in this folder",
        ) from error
