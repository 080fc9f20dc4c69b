"""The picture of README: real patches above distilled images of every pseudo-label, and SR crops of a test photo.

    python -m benchmarks.demo_picture [--home ddsr-home] [--run demo] docs/images/demo.png

Nothing is selected by eye: the real patches are those nearest to their centroid, the distilled images the first ones of the
set.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ddsr_core.imaging.images import save_png
from ddsr_core.pipeline.run_state import read_record
from ddsr_core.report.data import Report, gather
from ddsr_core.report.views import Tile, closeups_of, sheets_of
from ddsr_core.storage.remote_store import open_store

#: Sides of a patch and of a crop in the picture, the space between them, that for a line of text, and that for row labels.
TILE_PX, CROP_PX, GAP_PX, LINE_PX, LABEL_PX = 96, 123, 3, 18, 74
#: Images of each pseudo-label and kind.
ROWS = 2


class Canvas:
    """A white picture that pictures and text are put on."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), "white")
        self._draw = ImageDraw.Draw(self.image)
        self._font = ImageFont.load_default(13)

    def write(self, x: float, y: float, text: str, anchor: str = "mm") -> None:
        self._draw.text((x, y), text, fill="black", font=self._font, anchor=anchor)

    def put(self, x: int, y: int, tile: Tile, side: int) -> None:
        pixels = Image.fromarray(tile.pixels).resize((side, side), Image.Resampling.NEAREST)
        self.image.paste(pixels, (x, y))


def demo_picture(report: Report) -> np.ndarray:
    """The picture of a run, ``uint8 (H, W, 3)``."""
    sheets = list(sheets_of(report))
    kinds = [("real", [sheet.real for sheet in sheets])]
    if any(sheet.sampled for sheet in sheets):
        kinds += [("as sampled", [sheet.sampled for sheet in sheets]), ("restored", [sheet.distilled for sheet in sheets])]
    else:
        kinds += [("distilled", [sheet.distilled for sheet in sheets])]
    closeup = next(closeups_of(report), None)
    crops: Sequence[Tile] = [*closeup.reference, *closeup.rows[0][1]] if closeup else ()
    block = ROWS * (TILE_PX + GAP_PX) + 2 * GAP_PX
    below = LINE_PX + len(kinds) * block
    pitch = CROP_PX + GAP_PX
    width = max(pitch, LABEL_PX + len(sheets) * (TILE_PX + GAP_PX))
    lines = -(-len(crops) // (width // pitch))
    columns = -(-len(crops) // max(1, lines))
    canvas = Canvas(width, below + LINE_PX + lines * (CROP_PX + LINE_PX))
    for column, sheet in enumerate(sheets):
        x = LABEL_PX + column * (TILE_PX + GAP_PX)
        canvas.write(x + TILE_PX / 2, LINE_PX / 2, f"cluster {sheet.label}")
        for kind, (_, tiles) in enumerate(kinds):
            for row, tile in enumerate(tiles[column][:ROWS]):
                canvas.put(x, LINE_PX + kind * block + row * (TILE_PX + GAP_PX), tile, TILE_PX)
    for kind, (name, _) in enumerate(kinds):
        canvas.write(0, LINE_PX + kind * block + block / 2, name, "lm")
    if closeup:
        canvas.write(0, below + LINE_PX / 2, f"{closeup.image}; {closeup.rows[0][0]} trained on:", "lm")
    for index, tile in enumerate(crops):
        x, y = index % columns * pitch, below + LINE_PX + index // columns * (CROP_PX + LINE_PX)
        canvas.put(x, y, tile, CROP_PX)
        canvas.write(x + CROP_PX / 2, y + CROP_PX + LINE_PX / 2, tile.caption)
    return np.asarray(canvas.image)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", default="ddsr-home", help="home of the run")
    parser.add_argument("--run", default="demo", help="name of the run")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    options = parser.parse_args(arguments)
    save_png(options.picture, demo_picture(gather(read_record(open_store(options.home), options.run))))


if __name__ == "__main__":
    main()
