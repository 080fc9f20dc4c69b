"""Stage configs: frozen pydantic models, and the canonical form that artifact keys are made of."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ddsr_core.parallel import Spread
from ddsr_core.progress import ProgressFactory, silent

#: What a form says of a field's bounds, by their names in JSON schema.
BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
    "multipleOf": "a multiple of {}",
}


def _say_bounds(schema: dict[str, Any]) -> None:
    """Add each field's bounds to its description: the form in the Prefect UI checks them but does not show them."""
    for entry in schema.get("properties", {}).values():
        options = [entry, *entry.get("anyOf", ())]
        bounds = [text.format(option[name]) for option in options for name, text in BOUNDS.items() if name in option]
        if bounds:
            entry["description"] = f"{entry.get('description', '')} ({', '.join(bounds)})".strip()


class StageConfig(BaseModel):
    """Base of every stage config. Whatever stands in one changes the stage's key; what must not, stands in `Runtime`."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra=_say_bounds)


@dataclass(frozen=True)
class Runtime:
    """How a stage is run, as opposed to what it computes: nothing in here enters an artifact's key.

    Attributes:
        device: a torch device string; see `resolve_device` for ``auto``.
        progress: how progress is shown.
        run: name of the run, for those who wait for what it builds.
        photo_cache: folder of scores and embeddings of single photos from earlier builds, for sources that change little
            from one build to the next.
        spread: does parts of the work elsewhere; none: all of it here.
    """

    device: str = "cpu"
    progress: ProgressFactory = field(default=silent)
    run: str = ""
    photo_cache: Path | None = None
    spread: Spread | None = None


def resolve_device(name: str = "auto") -> str:
    """``auto`` becomes ``cuda`` where torch sees a GPU, else ``cpu``; any other name is passed through."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def canonical_json(value: Any) -> str:
    """The one JSON text of ``value`` (pydantic models included): sorted keys, no spaces, no NaN."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of `canonical_json`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
