"""The state that a pretraining run resumes from: checkpoints, and the settings that they were made with."""

from __future__ import annotations

import csv
import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ddsr_core.errors import ConfigError, StorageError
from ddsr_core.storage.files import write_atomically, write_json

SETTINGS = "settings.json"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that ``path`` holds either the old one or the complete new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.rename(path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint in ``path``; None if there is none yet.

    Raises:
        StorageError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise StorageError(
            f"the checkpoint cannot be read: {str(error).splitlines()[0]}",
            where=path,
            fix="delete this file; its phase then starts over",
        ) from error
    return state


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Store the settings of a phase in its folder, or compare them with the stored ones.

    Raises:
        ConfigError: they differ.
    """
    path = folder / SETTINGS
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        return
    begun = json.loads(path.read_text())
    now = json.loads(json.dumps(settings))
    changed = sorted(name for name in {*begun, *now} if begun.get(name) != now.get(name))
    if changed:
        name = changed[0]
        raise ConfigError(
            f"this run was started with {name} = {begun.get(name)}, but it is now {now.get(name)}",
            where=folder,
            fix=f"use the old settings, another --out, or delete {folder} and what later phases made from it",
        )


def write_curve(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """Rows as CSV, one column per name. The file is rewritten each time, so that a resumed run repeats no row."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in rows)
    write_atomically(path, text.getvalue().encode())
