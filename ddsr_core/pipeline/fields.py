"""Every setting of the pipeline: name, type, range, description, and its value in each preset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, WithJsonSchema
from pydantic.fields import FieldInfo

from ddsr_core.config import BOUNDS
from ddsr_core.pipeline.config import PipelineConfig, load_config, preset_names


@dataclass(frozen=True)
class Setting:
    """One field of the configuration.

    Attributes:
        name: as in ``--set``, such as ``sample.count``.
        kind: such as ``int`` or ``ema | raw``.
        bounds: such as ``at least 1``; empty if there are none.
        description: what it does, and when to change it.
        values: preset -> value.
    """

    name: str
    kind: str
    bounds: str
    description: str
    values: Mapping[str, Any]

    @property
    def stage(self) -> str:
        """The first part of the name: a stage, or the field itself at the top level."""
        return self.name.partition(".")[0]


def settings() -> list[Setting]:
    """Every setting, in the order of the configuration."""
    presets = {name: load_config(name) for name in preset_names()}
    return list(_settings(PipelineConfig, "", presets))


def _settings(model: type[BaseModel], prefix: str, presets: Mapping[str, BaseModel]) -> Iterator[Setting]:
    properties = model.model_json_schema(by_alias=False).get("properties", {})
    for name, info in model.model_fields.items():
        values = {preset: getattr(config, name) for preset, config in presets.items()}
        nested = _nested(info)
        if nested is not None and all(isinstance(value, BaseModel) for value in values.values()):
            yield from _settings(nested, f"{prefix}{name}.", values)
            continue
        plain = {preset: _plain(value) for preset, value in values.items()}
        text, bounds = (info.description or "").strip(), _bounds(properties.get(name, {}))
        yield Setting(f"{prefix}{name}", _names(info.metadata) or kind_of(info.annotation), bounds, text, plain)


def _nested(info: FieldInfo) -> type[BaseModel] | None:
    options = [info.annotation, *get_args(info.annotation)]
    return next((item for item in options if isinstance(item, type) and issubclass(item, BaseModel)), None)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value


def _bounds(schema: Mapping[str, Any]) -> str:
    options = [schema, *schema.get("anyOf", ())]
    return ", ".join(text.format(option[name]) for option in options for name, text in BOUNDS.items() if name in option)


def _names(metadata: Iterable[Any]) -> str:
    """The names of a table such as METRICS, if that is what a field takes."""
    schemas = [item.json_schema or {} for item in metadata if isinstance(item, WithJsonSchema)]
    return " | ".join(name for schema in schemas for name in schema.get("enum", ()))


def kind_of(annotation: Any) -> str:
    """A type as a user writes its values.

    >>> kind_of(int | None), kind_of(Literal["ema", "raw"]), kind_of(tuple[int, ...])
    ('int | null', 'ema | raw', 'list of int')
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin in (Union, UnionType):
        return " | ".join("null" if item is NoneType else kind_of(item) for item in arguments)
    if origin is tuple:
        kinds = list(dict.fromkeys(kind_of(item) for item in arguments if item is not Ellipsis))
        return f"list of {' and '.join(kinds)}"
    if origin is dict:
        return "table"
    if origin is not None and arguments:  # Annotated
        return _names(arguments[1:]) or kind_of(arguments[0])
    return getattr(annotation, "__name__", str(annotation))
