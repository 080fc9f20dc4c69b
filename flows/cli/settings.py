"""Commands on settings: config, fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ddsr_core.errors import ConfigError
from ddsr_core.pipeline.config import load_config, to_toml
from ddsr_core.pipeline.fields import settings
from flows.cli.options import Group, config_options, json_option, preset_option


@click.group(cls=Group, title="Settings")
def settings_group() -> None:
    """Commands on settings."""


@settings_group.command()
@preset_option("demo")
@config_options
@json_option
def config(preset: str, file: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print a preset with all its values, as TOML.

    Save the output, edit it, and pass it to --config.

    Example: ddsr config --preset best > my.toml
    """
    loaded = load_config(preset, file, overrides)
    click.echo(json.dumps(loaded.model_dump(mode="json"), indent=2) if as_json else to_toml(loaded).rstrip())


@settings_group.command()
@click.argument("stage", required=False)
@json_option
def fields(stage: str | None, as_json: bool) -> None:
    """List the settings: values, ranges, when to change them.

    STAGE is a stage or a group of settings, such as sample or sr.train. Without it, the names of all settings are listed.

    Example: ddsr fields sample
    """
    known = settings()
    chosen = [item for item in known if stage is None or item.name == stage or item.name.startswith(f"{stage}.")]
    if not chosen:
        stages = ", ".join(dict.fromkeys(item.stage for item in known))
        raise ConfigError(f"there are no settings {stage!r}", where="STAGE", fix=f"Choose one of: {stages}.")
    if as_json:
        click.echo(json.dumps([vars(item) for item in chosen], indent=2, default=str))
        return
    if stage is None:
        for name in dict.fromkeys(item.stage for item in chosen):
            own = [item.name.removeprefix(f"{name}.") for item in chosen if item.stage == name]
            click.echo(click.wrap_text(f"{name}: {', '.join(own)}", width=100, subsequent_indent="    "))
        click.echo("\nDescriptions and values: ddsr fields STAGE")
        return
    for item in chosen:
        bounds = f", {item.bounds}" if item.bounds else ""
        click.echo(f"{item.name}  ({item.kind}{bounds})")
        click.echo(click.wrap_text(item.description, width=100, initial_indent="    ", subsequent_indent="    "))
        click.echo(f"    {values_text(item.values)}")


def values_text(values: Mapping[str, Any]) -> str:
    """The values of a setting in the presets, once if they are all the same.

    >>> values_text({"demo": 70, "best": 70}), values_text({"demo": 64, "best": None})
    ('default: 70', 'demo: 64; best: null')
    """
    texts = {preset: json.dumps(value, default=str).strip('"') for preset, value in values.items()}
    if len(set(texts.values())) == 1:
        return f"default: {next(iter(texts.values()))}"
    return "; ".join(f"{preset}: {text}" for preset, text in texts.items())
