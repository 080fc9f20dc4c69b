"""Stage `restore`: a set of crops whose detail a teacher network replaces, as it does in a restored distilled set.

Detail restoration (`ddsr_core.sampling.restoration`) improves any set of images, real crops included. What distillation
adds is therefore the difference between a restored distilled set and crops that the same teacher has restored.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from ddsr_core.baselines.config import RestoreConfig
from ddsr_core.config import Runtime
from ddsr_core.imaging.bicubic import psnr_bic
from ddsr_core.imaging.image_sets import finish_image_set, image_set_name, read_image_set
from ddsr_core.imaging.images import save_png, to_float
from ddsr_core.sampling.restoration import restored_files
from ddsr_core.storage.files import write_json
from ddsr_core.storage.stage import Stage, StageResult

#: Columns of real crops (`ddsr_core.baselines.crops`).
FIELDS = {"photo": pa.string(), "y": pa.int32(), "x": pa.int32(), "psnr_bic": pa.float32()}


def run(config: RestoreConfig, *, crops: Path, teacher: Path, out: Path, runtime: Runtime) -> StageResult:
    """Write the image set with restored detail, with ``photo``, ``y`` and ``x`` of each crop and its new ``psnr_bic`` (dB).

    Args:
        crops: artifact of the crops stage.
        teacher: artifact of the train_sr stage.

    Raises:
        InputError: ``crops`` is no image set, or ``teacher`` holds no network.
    """
    rows = read_image_set(crops)
    paths = [crops / row["file_name"] for row in rows]
    written = []
    for index, image in enumerate(restored_files(teacher, paths, config.detail_restoration, runtime)):
        save_png(out / image_set_name(index), image)
        db = round(float(psnr_bic(to_float(image), config.kernel, config.scale)), 4)
        written.append({name: rows[index][name] for name in ("photo", "y", "x")} | {"psnr_bic": db})
    finish_image_set(out, written, FIELDS)
    mean = float(np.mean([row["psnr_bic"] for row in written]))
    counts = {"count": len(written), "psnr_bic_mean": round(mean, 4)}
    write_json(out / "summary.json", counts)
    return StageResult(counts)


STAGE = Stage(
    "restore",
    version=1,
    run=run,
    config=RestoreConfig,
    section="III",
    on_gpu=True,
    words="{count:,} crops with restored detail",
)
