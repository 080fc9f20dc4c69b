"""Pictures for the page of a stage in the Prefect UI: contact sheets, restored crops, curves."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ddsr_core.imaging.contact_sheet import contact_sheet
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.image_sets import read_image_set
from ddsr_core.storage.stage import Artifact

#: Longest side of a picture. The server keeps pictures as text in its database.
SIDE_PX = 1024
SHEET_IMAGES, SHEET_COLUMNS, SHEET_PX = 100, 10, 96


def pictures(artifact: Artifact) -> Mapping[str, str]:
    """Name -> data URI of each picture of a stage; empty for a stage without pictures."""
    draw = PICTURES.get(artifact.manifest.stage)
    return draw(artifact.path) if draw else {}


def _finetuned(folder: Path) -> Mapping[str, str]:
    return {"samples": _last(folder / "samples"), "curves": _curves(folder / "curves.csv")}


def sampled(folder: Path) -> Mapping[str, str]:
    """A contact sheet of a distilled set."""
    rows = read_image_set(folder)
    shown = rows[:: -(-len(rows) // SHEET_IMAGES)]
    images = [read_rgb(folder / row["file_name"]) for row in shown]
    return {"distilled": picture_uri(contact_sheet(images, SHEET_COLUMNS, SHEET_PX))}


def _trained(folder: Path) -> Mapping[str, str]:
    curves = {"curves": _curves(folder / "curves.csv")}
    return {**curves, "restored": _last(folder / "grids")} if any((folder / "grids").glob("*.png")) else curves


PICTURES: Mapping[str, Callable[[Path], Mapping[str, str]]] = {
    "finetune": _finetuned,
    "sample": sampled,
    "train_sr": _trained,
}


def _last(folder: Path) -> str:
    return picture_uri(read_rgb(max(folder.glob("*.png"))))


def _curves(path: Path) -> str:
    """One small plot over the steps per column of a table of curves."""
    with path.open(newline="") as file:
        rows = [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]
    names = [name for name in rows[0] if name != "step"] if rows else []
    figure = Figure(figsize=(3.2 * max(1, len(names)), 2.6), layout="constrained")
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), place)
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], linewidth=1)
        axes.set(title=name, xlabel="step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return _png(buffer.getvalue())


def picture_uri(image: np.ndarray) -> str:
    """A PNG data URI of ``uint8 (H, W, 3)``, scaled down to `SIDE_PX`."""
    picture = Image.fromarray(image)
    picture.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return _png(buffer.getvalue())


def _png(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
