"""Stage configs: frozen pydantic models, and the canonical form that enters artifact keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from ddsr_core.errors import ChangedInputError, ConfigError
from ddsr_core.parallel import RunParts
from ddsr_core.progress import ProgressFactory, silent
from ddsr_core.reporters import OpenReporter, no_reporter

#: Wording of a field's bounds in forms, by their names in JSON schema.
BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
    "multipleOf": "a multiple of {}",
}


def _say_bounds(schema: dict[str, Any]) -> None:
    """Add each field's bounds to its description, since the form in the Prefect UI checks but does not show them."""
    for entry in schema.get("properties", {}).values():
        options = [entry, *entry.get("anyOf", ())]
        bounds = [text.format(option[name]) for option in options for name, text in BOUNDS.items() if name in option]
        if bounds:
            entry["description"] = f"{entry.get('description', '')} ({', '.join(bounds)})".strip()


class StageConfig(BaseModel):
    """Base of every stage config.

    Every field is part of the stage's key. Whatever must not change the key belongs in `Runtime`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, json_schema_extra=_say_bounds)
    #: Fields that were added after artifacts had been made. They enter the key only if they differ from their default, so
    #: that those artifacts keep their keys.
    keyed_if_set: ClassVar[frozenset[str]] = frozenset()

    def canonical(self) -> dict[str, Any]:
        """The config as JSON values, in the form that enters the key."""
        values = self.model_dump(mode="json")
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if name in self.keyed_if_set and value == info.default:
                del values[name]
            elif isinstance(value, StageConfig):
                values[name] = value.canonical()
        return values


@dataclass(frozen=True)
class Runtime:
    """How a stage is run, as opposed to what it computes. Nothing in it enters an artifact's key.

    Attributes:
        device: a torch device string; `resolve_device` explains ``auto``.
        progress: how progress is shown.
        run: name of the run, shown to processes that wait for what it builds.
        photo_cache: folder with scores and embeddings of single photos from earlier builds, for photo sources that change
            little from one build to the next.
        run_parts: runs parts of the work in other processes; None does all of it in this one.
        reporter: where training curves are shown (`ddsr_core.reporters`).
        input_digests: digests in the key of inputs that come from outside the store and may change while they are read.
    """

    device: str = "cpu"
    progress: ProgressFactory = field(default=silent)
    run: str = ""
    photo_cache: Path | None = None
    run_parts: RunParts | None = None
    reporter: OpenReporter = field(default=no_reporter)
    input_digests: Mapping[str, str] = field(default_factory=dict)

    def require_unchanged(self, name: str, digest: str, where: Path) -> None:
        """Make sure that an input has been read as the key says. A stage calls this before it spends hours on it.

        Args:
            name: of the input. Nothing is compared for an artifact of the store.
            digest: of what has been read.
            where: the input, for the message.

        Raises:
            ChangedInputError: it is not the digest in the key.
        """
        if self.input_digests.get(name, digest) != digest:
            raise ChangedInputError(f"the input {name} changed while it was read", where=where, fix="run again")


def resolve_device(name: str = "auto") -> str:
    """``auto`` becomes ``cuda`` if torch sees a GPU, else ``cpu``; any other name is checked and returned.

    Raises:
        ConfigError: torch knows no such device, or this machine has none.
    """
    if name == "cpu":
        return name
    import torch  # configs are imported by commands that must answer at once

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        fix = "set it to cpu, cuda, cuda:1 and so on, or auto"
        raise ConfigError(f"{name!r} is not a torch device", where="device", fix=fix) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        what = f"torch sees {torch.cuda.device_count()} CUDA GPUs on this machine"
        raise ConfigError(what, where=f"device={name}", fix="set it to cpu or auto, or install a torch build for this GPU")
    return name


def canonical_json(value: Any) -> str:
    """The unique JSON text of ``value``, which may be a pydantic model: sorted keys, no spaces, no NaN."""
    if isinstance(value, StageConfig):
        value = value.canonical()
    elif isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of `canonical_json`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
