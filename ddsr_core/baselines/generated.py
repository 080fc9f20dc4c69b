"""Generated training sets, recognized by the columns that their stages write."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ddsr_core.baselines.names import TRAINING_SETS
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.imaging.image_sets import read_image_set

#: Stage `sample` writes this column for distilled images and for those of the base model.
_SAMPLED = "nearest_patch_id"
#: Stage `gsdd` writes this column, but not `_SAMPLED`.
_LABELED = "pseudo_label"
_PLACES = {
    "distilled": "the folder `distilled` of a run (HOME/runs/NAME/distilled)",
    "base": "the artifact of the stage `sample` that a run with training set `base` lists in its run.json",
    "gsdd": "the artifact of the stage `gsdd` that a run with training set `gsdd` lists in its run.json",
}


def require_generated(kind: str, data: Path) -> None:
    """Check that ``data`` is a generated training set of that kind: a folder with ``metadata.jsonl``, or a Parquet file.

    Sampled images of the fine-tuned model and of the base model have the same columns and are accepted as either.

    Args:
        kind: a generated kind in `TRAINING_SETS`.
        data: what the user gave.

    Raises:
        ConfigError: ``kind`` is unknown, or not generated.
        InputError: ``data`` is something else. The message says what to give.
    """
    generated = [name for name, training_set in TRAINING_SETS.items() if training_set.generated]
    if kind not in generated:
        known = ", ".join(generated)
        raise ConfigError(f"{kind!r} is not a generated training set", where="training_set", fix=f"use one of {known}")
    columns = _columns(data)
    matches = _LABELED in columns and (_SAMPLED in columns) == (kind != "gsdd")
    if not matches:
        raise InputError(
            f"these images are not a {kind} set",
            where=data,
            fix=f"name {_PLACES[kind]}, or use --training-set full to train on all images of the folder",
        )


def _columns(data: Path) -> set[str]:
    """Columns of an image set; none for anything else."""
    if data.suffix == ".parquet" and data.is_file():
        try:
            return set(pq.read_schema(data).names)
        except (OSError, pa.ArrowInvalid):
            return set()
    try:
        rows = read_image_set(data)
    except (InputError, ValueError):
        return set()
    return set(rows[0]) if rows and isinstance(rows[0], dict) else set()
