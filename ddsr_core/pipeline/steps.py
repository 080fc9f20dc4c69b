"""Single steps outside a run: what training and measuring one network need, and searching patches."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from ddsr_core.baselines.names import TRAINING_SETS, TrainingSetName
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.imaging.contact_sheet import contact_sheet
from ddsr_core.imaging.images import save_png
from ddsr_core.imaging.kernel import SCALE, Scale
from ddsr_core.imaging.photos import iter_photos
from ddsr_core.pipeline.config import PipelineConfig, checked, merge, parse_override
from ddsr_core.pipeline.distill import training_set
from ddsr_core.pipeline.run_folder import artifact_paths
from ddsr_core.pipeline.stages import Stages
from ddsr_core.pipeline.training_sets import photos_alone
from ddsr_core.pseudo_labels import search
from ddsr_core.pseudo_labels.embeddings import read_config as read_embeddings_config
from ddsr_core.pseudo_labels.names import EmbedderName
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.plan import plan_of
from ddsr_core.storage.files import sha256_of
from ddsr_core.storage.stage import Artifact, Source, require_whole
from ddsr_core.storage.store import Store

M = TypeVar("M", bound=BaseModel)


def with_overrides(config: type[M], values: dict[str, Any], overrides: Iterable[str] = ()) -> M:
    """A stage config from values and ``field=value`` texts.

    Raises:
        ConfigError: unknown field, or a value out of range.
    """
    for text in overrides:
        values = merge(values, parse_override(text, config))
    return checked(config, values)


@dataclass(frozen=True)
class Crops:
    """Which crops of a folder of images a network is trained on.

    Attributes:
        source: kind of training set, one that can be cut out of photos.
        budget: number of crops, for kinds that choose some.
        patch_px: height and width of the crops, pixels.
        embeddings: features that k-center and HDC compare crops by.
    """

    source: TrainingSetName = "full"
    budget: int = 70
    patch_px: int = 64
    embeddings: EmbedderName = "vgg16"


def fitted(config: TrainSRConfig, data: Path) -> TrainSRConfig:
    """The config with the published crop shrunk to the size of the images if they are smaller; else unchanged."""
    published = plan_of(config).lr_patch_px
    first = next(iter(iter_photos(data)), None)
    if config.lr_patch_px is not None or first is None:
        return config
    largest = min(first.read().shape[:2]) // config.scale
    return config if largest >= published else config.model_copy(update={"lr_patch_px": largest})


def images_of(stages: Stages, data: Source, kind: TrainingSetName) -> Artifact | Source:
    """The data themselves, as for a generated set, or crops of them.

    Raises:
        ConfigError: there is no such kind of training set.
    """
    if kind not in TRAINING_SETS:
        raise ConfigError(f"unknown training set {kind!r}", where="source", fix=f"one of: {', '.join(TRAINING_SETS)}")
    if TRAINING_SETS[kind].generated:
        return data
    return training_set(stages, kind, photos_alone(stages, data))


def config_of(crops: Crops, scale: Scale = SCALE) -> PipelineConfig:
    """A config whose stages cut such crops, for networks of this upsampling factor."""
    size = crops.patch_px
    values = {
        "scale": scale,
        "patches": {"patch_px": size, "stride_px": max(4, size // 2 // 4 * 4)},
        "embeddings": {"backend": crops.embeddings, "image_px": min(224, max(32, size))},
        "finetune": {"class_row_init": "auto"},
        "sample": {"count": crops.budget},
    }
    return checked(PipelineConfig, values)


def summary_of(evaluated: Artifact) -> dict[str, Any]:
    """What an evaluation has measured, as in its ``summary.json``."""
    return dict(json.loads((evaluated.path / "summary.json").read_text()))


def weights_source(path: Path) -> Source:
    """A weights file, or a folder with ``weights.safetensors``, as a stage input.

    Raises:
        InputError: it is neither.
        StorageError: it is a damaged artifact.
    """
    require_whole(path)
    file = path / "weights.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise InputError("no weights here", where=path, fix="name a weights file, a train_sr folder, or bicubic")
    return Source(path, sha256_of(file))


def search_run(
    store: Store, name: str, query: str | Path, count: int = 12, sheet: Path | None = None
) -> list[dict[str, Any]]:
    """The patches of a run nearest to a text or to an image file.

    Args:
        query: a text (str), which needs open_clip features, or an image (Path).
        count: how many patches.
        sheet: where to write a contact sheet of them (PNG).

    Raises:
        InputError: the run has no clusters yet, or the image cannot be read.
        ConfigError: a text, but the run's feature network has no text tower.
    """
    paths = artifact_paths(store, name, "patches", "embeddings", "clusters")
    config = read_embeddings_config(paths["embeddings"])
    vector = search.image_query(query, config) if isinstance(query, Path) else search.text_query(query, config)
    hits = search.search(paths["clusters"], vector, count)
    if sheet is not None:
        images = search.read_patches(paths["patches"], [hit.patch_id for hit in hits])
        save_png(sheet, contact_sheet(images, columns=6, px=128))
    return [asdict(hit) for hit in hits]
