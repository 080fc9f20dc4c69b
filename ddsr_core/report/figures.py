"""Pictures of the report: curves and histograms as inline SVG (colored by the page's CSS), images as data URIs."""

from __future__ import annotations

import base64
import io
import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddsr_core.imaging.decode import decode_rgb, read_rgb
from ddsr_core.imaging.images import encode_png, save_png

if TYPE_CHECKING:
    from PIL import Image

WIDTH, HEIGHT = 480, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 38
CURVE_POINTS = 150
#: Longest side of a patch on a cluster sheet, pixels.
THUMB_PX = 128


def thumbnail_uri(image: np.ndarray) -> str:
    """A WebP data URI of ``uint8 (H, W, 3)``, at most `THUMB_PX` wide and high; for overviews, so lossy."""
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((THUMB_PX, THUMB_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=92, method=4)
    return _uri(buffer.getvalue(), "image/webp")


def exact_uri(image: np.ndarray) -> str:
    """A PNG data URI of ``uint8 (H, W, 3)``: every pixel as it is, for close-ups that are compared."""
    return _uri(encode_png(image), "image/png")


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def crop_psnr(sr: np.ndarray, hr: np.ndarray) -> float | None:
    """PSNR in dB over RGB of two ``uint8 (H, W, 3)``; None where they are equal or differ in size."""
    if sr.shape != hr.shape:
        return None
    error = float(np.square(sr.astype(np.float64) - hr).mean())
    return 10 * math.log10(255**2 / error) if error else None


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers within [low, high].

    >>> ticks(0, 1), ticks(17.2, 31)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [18.0, 20.0, 22.0, 24.0, 26.0, 28.0, 30.0])
    """
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(unit * power for unit in (1, 2, 5, 10) if unit * power * count >= span * 0.7)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(series: dict[str, tuple[np.ndarray, np.ndarray]], *, title: str, x_label: str, y_label: str) -> str:
    """Lines of ``name: (x, y)``; each point is the mean of a bin where a curve has more than `CURVE_POINTS`."""
    drawn = {name: _binned(np.asarray(x, float), np.asarray(y, float)) for name, (x, y) in series.items()}
    drawn = {name: points for name, points in drawn.items() if len(points[0])}
    if not drawn:
        return ""
    frame = _Frame(np.concatenate([x for x, _ in drawn.values()]), np.concatenate([y for _, y in drawn.values()]))
    shapes = []
    for index, (name, (x, y)) in enumerate(drawn.items()):
        points = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in zip(x, y, strict=True))
        shapes.append(f'<polyline class="line c{index % 6}" points="{points}"><title>{escape(name)}</title></polyline>')
    return frame.svg(title, "".join(shapes), x_label, y_label)


def histogram(groups: dict[str, np.ndarray], *, title: str, x_label: str, bins: int = 40) -> str:
    """Outlines of histograms over common bins, each as a share of its group in percent."""
    if not groups:
        return ""
    values = np.concatenate(list(groups.values()))
    low, high = (float(v) for v in np.percentile(values, (0.5, 99.5)))
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    shares = {name: 100 * np.histogram(np.clip(v, edges[0], edges[-1]), edges)[0] / len(v) for name, v in groups.items()}
    frame = _Frame(edges, np.array([0, max(float(share.max()) for share in shares.values())]))
    shapes = []
    for index, (name, share) in enumerate(shares.items()):
        xs, ys = np.repeat(edges, 2), np.concatenate([[0], np.repeat(share, 2), [0]])
        points = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in zip(xs, ys, strict=True))
        shapes.append(f'<polygon class="area c{index % 6}" points="{points}"><title>{escape(name)}</title></polygon>')
    return frame.svg(title, "".join(shapes), x_label, "share, %")


def _binned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= CURVE_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), CURVE_POINTS)
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])


class _Frame:
    """Axes of one chart: data to SVG coordinates, grid and labels."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.x_low, self.x_high = float(x.min()), float(x.max())
        self.y_low, self.y_high = float(y.min()), float(y.max())
        margin = 0.04 * (self.y_high - self.y_low)
        self.y_high += margin
        self.y_low -= margin if self.y_low else 0

    def x(self, value: float) -> float:
        span = (self.x_high - self.x_low) or 1
        return LEFT + (value - self.x_low) / span * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        span = (self.y_high - self.y_low) or 1
        return HEIGHT - BOTTOM - (value - self.y_low) / span * (HEIGHT - TOP - BOTTOM)

    def svg(self, title: str, shapes: str, x_label: str, y_label: str) -> str:
        bottom, middle = HEIGHT - BOTTOM, (HEIGHT - BOTTOM + TOP) / 2
        parts = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" class="chart">',
            f"<title>{escape(title)}</title>",
        ]
        for value in ticks(self.y_low, self.y_high):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        for value in ticks(self.x_low, self.x_high):
            parts.append(f'<text x="{self.x(value):.1f}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>')
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
        parts.append(shapes)
        parts.append(
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>'
        )
        parts.append(
            f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text></svg>'
        )
        return "".join(parts)


TILE, GAP, BAND = 96, 3, 24


def overview(
    clusters: list[tuple[str, list[bytes], list[Path]]], crops: list[tuple[str, np.ndarray]], title: str, path: Path
) -> Path:
    """Draw the picture for a README as PNG: per cluster a column, real patches above distilled images; below, SR crops.

    Args:
        clusters: (label, PNG bytes of real patches, files of distilled images) a cluster.
        crops: (caption, ``uint8 (H, W, 3)``) of the same place: HR, bicubic, then those of one network.
        title: stands above the third crop.
        path: written atomically.
    """
    from PIL import Image, ImageDraw, ImageFont

    real = max((len(r) for _, r, _ in clusters), default=0)
    made = max((len(d) for _, _, d in clusters), default=0)
    columns = max(len(clusters), 7)
    gutter, width = 74, 74 + columns * (TILE + GAP) + 8
    sheet = BAND + real * (TILE + GAP) + 8 + made * (TILE + GAP) if clusters else 0
    side = min((width - 16) // max(1, len(crops)) - GAP, 2 * TILE)
    height = sheet + (BAND + side + BAND if crops else 0) + 8
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
        draw.text((x + side // 2, sheet + BAND + side + BAND // 2), caption, "black", font=font, anchor="mm")
    if crops:
        draw.text((8 + 2 * (side + GAP), sheet + BAND // 2), title, "black", font=font, anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, np.asarray(canvas))
    return path
