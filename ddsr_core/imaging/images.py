"""Images in and out: safe decoding, the photo sources a user may name, and the formats that artifacts are written in.

Pixels are ``uint8 (H, W, 3)`` RGB on disk, ``float32 (B, 3, H, W)`` in [0, 1] for SR and in [-1, 1] for diffusion; the
conversions stand here and nowhere else.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from ddsr_core.config import digest_of
from ddsr_core.errors import InputError
from ddsr_core.storage.store import Source, sha256_of, write_atomically, writing_atomically

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from torch import Tensor

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
#: Larger images are refused: 256 megapixels take 3 GiB as float.
MAX_PIXELS = 256_000_000
#: Rows of a Parquet file that are in memory at a time.
ROWS_PER_GROUP = 256
#: What stands in place of the digest of an image that cannot be read, before the reason.
UNREADABLE = "unreadable: "


def decode_rgb(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file to ``uint8 (H, W, 3)`` RGB.

    EXIF orientation is applied; palette, gray and CMYK become RGB; 16-bit gray is scaled to 8; transparency is laid on
    white; of an animation the first frame is taken.

    Raises:
        InputError: not an image, truncated, or more than ``max_pixels``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            image: Image.Image = Image.open(io.BytesIO(data))
            if image.width * image.height > max_pixels:
                raise InputError(f"too large: {image.width}x{image.height}", where=name, fix="scale it down")
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(_to_rgb(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError("not a readable image", where=name, fix=f"repair or remove it ({error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image  # convert would copy
    if image.mode.startswith("I;16") or image.mode == "I":
        wide = np.asarray(image).astype(np.int64)
        return Image.fromarray((wide >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(np.asarray(image).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def read_rgb(path: Path) -> np.ndarray:
    """`decode_rgb` of a file."""
    return decode_rgb(Path(path).read_bytes(), str(path))


def encode_png(image: np.ndarray, level: int = 6, icc_profile: bytes | None = None) -> bytes:
    """PNG bytes of ``uint8 (H, W, 3)``, or ``(H, W, 4)`` with alpha; the same pixels always give the same bytes.

    ``level``: effort of the compression, 0 to 9.
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=level, icc_profile=icc_profile)
    return buffer.getvalue()


def save_png(path: Path, image: np.ndarray) -> None:
    """Write ``uint8 (H, W, 3)`` as PNG, atomically."""
    write_atomically(path, encode_png(image))


def to_float(image: np.ndarray, device: str | torch.device = "cpu") -> Tensor:
    """``uint8 (H, W, 3)`` or ``(B, H, W, 3)`` to ``float32 (B, 3, H, W)`` in [0, 1], on ``device``."""
    import torch

    batch = torch.from_numpy(np.array(image if image.ndim == 4 else image[None])).to(
        device
    )  # bytes, a quarter of the floats
    return batch.permute(0, 3, 1, 2).float().div(255)


def to_uint8(x: Tensor) -> np.ndarray:
    """``float (B, 3, H, W)`` in [0, 1] (clamped, rounded) to ``uint8 (B, H, W, 3)``."""
    import torch

    pixels = x.detach().float().mul(255).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_signed(x: Tensor) -> Tensor:
    """[0, 1] to [-1, 1]."""
    return x * 2 - 1


def from_signed(x: Tensor) -> Tensor:
    """[-1, 1] to [0, 1]."""
    return (x + 1) / 2


def find_images(folder: Path) -> list[Path]:
    """Every image file below ``folder`` (by suffix; hidden files and folders left out), sorted by relative path."""
    folder = Path(folder)
    paths = (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    visible = (p for p in paths if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    return sorted(visible, key=lambda p: p.relative_to(folder).as_posix())


@dataclass(frozen=True)
class Photo:
    """One image of a source, not yet decoded.

    Attributes:
        name: path relative to the source, or the row's path in a Parquet file.
        load: returns the file's bytes.
    """

    name: str
    load: Callable[[], bytes]

    def read(self) -> np.ndarray:
        """``uint8 (H, W, 3)``.

        Raises:
            InputError: the file cannot be decoded.
        """
        try:
            data = self.load()
        except OSError as error:
            raise InputError("cannot be read", where=self.name, fix=str(error)) from error
        return decode_rgb(data, self.name)


def iter_photos(source: Path | str) -> Iterator[Photo]:
    """The photos of a folder, a single image, a glob pattern, or Parquet (file or folder) with an image column.

    In a fixed order: by relative path, or by row.

    Raises:
        InputError: the source is not there.
    """
    path = Path(source).expanduser()
    if any(sign in str(source) for sign in "*?[") and not path.exists():
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        yield from (Photo(p.as_posix(), p.read_bytes) for p in files if p.suffix.lower() in IMAGE_SUFFIXES)
    elif path.is_dir():
        images = find_images(path)
        yield from (Photo(p.relative_to(path).as_posix(), p.read_bytes) for p in images)
        if not images:
            yield from _parquet_photos(path)
    elif path.suffix == ".parquet" and path.is_file():
        yield from _parquet_photos(path)
    elif path.is_file():
        yield Photo(path.name, path.read_bytes)
    else:
        raise InputError("there is no such folder or file", where=path, fix="name a folder of photos with --images")


def _parquet_photos(path: Path) -> Iterator[Photo]:
    for index, row in enumerate(read_image_parquet(path)):
        name = row["image"].get("path") or f"row-{index:08d}"
        data: bytes = row["image"]["bytes"]
        yield Photo(str(name), partial(bytes, data))


def photo_digests(source: Path | str) -> list[tuple[str, str]]:
    """Name and SHA-256 of every image of a photo source, in order; of one that cannot be read, the reason.

    Raises:
        InputError: it is not there, or holds no image file.
    """
    entries = []
    for photo in iter_photos(source):
        try:
            entries.append((photo.name, hashlib.sha256(photo.load()).hexdigest()))
        except OSError as error:  # unreadable now and then: part of the input, counted as skipped by the stage
            entries.append((photo.name, f"{UNREADABLE}{error.strerror}"))
    if not entries:
        raise InputError(
            "no images found", where=Path(source), fix=f"name a folder with {', '.join(sorted(IMAGE_SUFFIXES))} files",
        )  # fmt: skip
    return entries


def photo_source(source: Path | str) -> Source:
    """A photo source as stage input: its digest covers the names and contents of its images, not their place or age.

    Raises:
        InputError: it is not there, or holds no image file.
    """
    return Source(Path(source).expanduser(), digest_of(sorted(photo_digests(source))))


def image_schema(fields: Mapping[str, pa.DataType]) -> pa.Schema:
    """Arrow schema with an ``image`` struct that Hugging Face ``datasets`` shows as pictures, then ``fields``."""
    import pyarrow as pa

    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    names = {
        "string": "string",
        "int32": "int32",
        "int64": "int64",
        "float": "float32",
        "double": "float64",
        "bool": "bool",
    }
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    for name, kind in fields.items():
        features[name] = {"dtype": names[str(kind)], "_type": "Value"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([("image", struct), *fields.items()], metadata=metadata)


def write_image_parquet(path: Path, rows: Iterable[Mapping[str, Any]], fields: Mapping[str, pa.DataType]) -> None:
    """Write rows (``image`` as PNG bytes, or a struct with ``bytes`` and ``path``, and ``fields``), atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def whole(row: Mapping[str, Any]) -> dict[str, Any]:
        image = row["image"]
        return {**row, "image": image if isinstance(image, Mapping) else {"bytes": image, "path": None}}

    schema = image_schema(fields)
    remaining = map(whole, rows)
    with writing_atomically(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        while group := list(islice(remaining, ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def read_image_parquet(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, or of a folder's Parquet files in order of name, a few at a time.

    Only files with an ``image`` column are read in a folder.

    Raises:
        InputError: damaged, or without an image column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    for file in files:
        try:
            parquet = pq.ParquetFile(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError("not a readable Parquet file", where=file, fix=str(error)) from error
        if "image" not in parquet.schema_arrow.names:
            if path.is_dir():
                continue
            raise InputError("the Parquet file has no column `image`", where=file, fix="rename the image column")
        for batch in parquet.iter_batches(batch_size=64, columns=columns):
            yield from batch.to_pylist()


def image_set_name(index: int) -> str:
    """Relative path of image ``index`` of an image set."""
    return f"images/{index:06d}.png"


def finish_image_set(out: Path, rows: list[dict[str, Any]], fields: Mapping[str, pa.DataType]) -> None:
    """Write ``metadata.jsonl`` and ``images.parquet`` for the PNGs that lie in ``out/images`` already.

    ``rows[i]`` describes ``images/<i>.png``; its file name is added here.
    """
    named = [{"file_name": image_set_name(index), **row} for index, row in enumerate(rows)]
    lines = "".join(json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in named)
    write_atomically(out / "metadata.jsonl", lines.encode())
    with_bytes = (
        {"image": {"bytes": (out / row["file_name"]).read_bytes(), "path": row["file_name"]}, **row} for row in named
    )
    import pyarrow as pa

    write_image_parquet(out / "images.parquet", with_bytes, {"file_name": pa.string(), **fields})


def read_image_set(folder: Path) -> list[dict[str, Any]]:
    """Rows of an image set's ``metadata.jsonl``.

    Raises:
        InputError: there is none.
    """
    path = Path(folder) / "metadata.jsonl"
    if not path.is_file():
        raise InputError("not an image set: no metadata.jsonl", where=folder, fix="name a folder that `ddsr` wrote")
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def file_digest(path: Path) -> str:
    """SHA-256 of a photo file; equal photos under two names have the same."""
    return sha256_of(path)
