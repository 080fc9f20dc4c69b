"""Images of the report as data URIs, and the overview picture of a run."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ddsr_core.imaging.decode import decode_rgb, read_rgb
from ddsr_core.imaging.images import encode_png, save_png

#: Longest side of a patch on a cluster sheet, pixels.
THUMB_PX = 128


def thumbnail_uri(image: np.ndarray, px: int = THUMB_PX) -> str:
    """A WebP data URI of ``uint8 (H, W, 3)``, at most ``px`` wide and high; lossy, for overviews."""
    picture = Image.fromarray(image)
    picture.thumbnail((px, px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=92, method=4)
    return _uri(buffer.getvalue(), "image/webp")


def exact_uri(image: np.ndarray) -> str:
    """A PNG data URI of ``uint8 (H, W, 3)``: lossless, for close-ups that are compared."""
    return _uri(encode_png(image), "image/png")


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def crop_psnr(sr: np.ndarray, hr: np.ndarray) -> float | None:
    """PSNR in dB over RGB of two ``uint8 (H, W, 3)``; None if they are equal or differ in size."""
    if sr.shape != hr.shape:
        return None
    error = float(np.square(sr.astype(np.float64) - hr).mean())
    return 10 * math.log10(255**2 / error) if error else None


TILE, GAP, BAND = 96, 3, 24


def overview(
    clusters: list[tuple[str, list[bytes], list[Path]]], crops: list[tuple[str, np.ndarray]], title: str, path: Path
) -> Path:
    """Write an overview as PNG: one column per cluster with real patches above distilled images, and below them SR crops.

    Args:
        clusters: (label, PNG bytes of real patches, files of distilled images) per cluster.
        crops: (caption, ``uint8 (H, W, 3)``) of the same place: HR, bicubic, then the outputs of one network.
        title: caption above the third crop.
        path: written atomically.
    """
    real = max((len(r) for _, r, _ in clusters), default=0)
    made = max((len(d) for _, _, d in clusters), default=0)
    columns = max(len(clusters), 7)
    gutter, width = 74, 74 + columns * (TILE + GAP) + 8
    sheet = BAND + real * (TILE + GAP) + 8 + made * (TILE + GAP) if clusters else 0
    side = min((width - 16) // max(1, len(crops)) - GAP, 2 * TILE)
    crops = [(caption.replace(" + ", "\n+ "), image) for caption, image in crops]
    below = BAND * (1 + max((caption.count("\n") for caption, _ in crops), default=0))
    height = sheet + (BAND + side + below if crops else 0) + 8
    canvas = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)

    def put(tile: Image.Image, x: int, y: int, px: int) -> None:
        canvas.paste(tile.resize((px, px), Image.Resampling.LANCZOS), (x, y))

    split = BAND + real * (TILE + GAP) + 8
    for column, (label, patches, images) in enumerate(clusters):
        x = gutter + column * (TILE + GAP)
        draw.text((x + TILE // 2, BAND // 2), label, "black", font=font, anchor="mm")
        for row, data in enumerate(patches):
            put(Image.fromarray(decode_rgb(data, label)), x, BAND + row * (TILE + GAP), TILE)
        for row, file in enumerate(images):
            put(Image.fromarray(read_rgb(file)), x, split + row * (TILE + GAP), TILE)
    for text, top, rows in (("real", BAND, real), ("distilled", split, made)):
        if clusters and rows:
            draw.text((8, top + rows * (TILE + GAP) // 2), text, "black", font=font, anchor="lm")
    for index, (caption, image) in enumerate(crops):
        x = 8 + index * (side + GAP)
        put(Image.fromarray(image), x, sheet + BAND, side)
        draw.text(
            (x + side // 2, sheet + BAND + side + below // 2), caption, "black", font=font, anchor="mm", align="center"
        )
    if crops:
        draw.text((8 + 2 * (side + GAP), sheet + BAND // 2), title, "black", font=font, anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, np.asarray(canvas))
    return path
