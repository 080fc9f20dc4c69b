"""Single steps outside a run: train one network, measure networks, export, search."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from ddsr_core.baselines.names import TRAINING_SETS, TrainingSetName
from ddsr_core.diffusion.base import base_source, vae_source
from ddsr_core.diffusion.export import export
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.imaging.contact_sheet import contact_sheet
from ddsr_core.imaging.images import save_png
from ddsr_core.imaging.photos import iter_photos
from ddsr_core.pipeline.config import PipelineConfig, checked, merge, parse_override
from ddsr_core.pipeline.distill import training_set
from ddsr_core.pipeline.run_folder import artifact_paths, read_config
from ddsr_core.pipeline.stages import Stages
from ddsr_core.pipeline.training_sets import photos_alone
from ddsr_core.pseudo_labels import search
from ddsr_core.pseudo_labels.embeddings import read_config as read_embeddings_config
from ddsr_core.pseudo_labels.names import EmbedderName
from ddsr_core.sampling.sample import load_tuned
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.onnx_export import export_onnx
from ddsr_core.sr.plan import plan_of
from ddsr_core.sr.weights import LoadedNetwork, load_network
from ddsr_core.storage.files import sha256_of, storage_errors
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


def config_of(crops: Crops) -> PipelineConfig:
    """A config whose stages cut such crops."""
    size = crops.patch_px
    values = {
        "patches": {"patch_px": size, "stride_px": max(4, size // 2 // 4 * 4)},
        "embeddings": {"backend": crops.embeddings, "image_px": min(224, max(32, size))},
        "finetune": {"class_row_init": None},
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


@dataclass(frozen=True)
class ModelExport:
    """How a fine-tuned model is written.

    Attributes:
        layout: ``original``, one file in the layout of the DiT release, or ``diffusers``, a folder.
        weights: ``ema`` for averaged weights, ``raw`` for the last ones.
        base, vae: of an adapter's folder that is exported without its run.
    """

    layout: Literal["original", "diffusers"] = "original"
    weights: Literal["ema", "raw"] = "ema"
    base: str | None = None
    vae: str | None = None


def export_model(store: Store, source: str, out: Path, wanted: ModelExport) -> Path:
    """Export the fine-tuned model of a run, or an adapter's folder with its base.

    Args:
        source: name of a run, or an adapter's folder.

    Raises:
        InputError: no such run or adapter, or the adapter's base is not named.
        StorageError: the adapter is damaged.
    """
    base, vae = wanted.base, wanted.vae
    adapter = Path(source).expanduser()
    if not (adapter / "adapter.json").is_file():
        config = read_config(store, source)
        adapter = artifact_paths(store, source, "finetune")["finetune"]
        base, vae = base or config["base"], vae or config.get("vae")
    require_whole(adapter)
    if base is None:
        raise InputError("an adapter needs its base model", where=adapter, fix="name it with --base")
    folder = vae_source(vae).path if vae else None
    model, label_map = load_tuned(adapter, base_source(base).path, wanted.weights, "cpu", folder)
    return export(model, label_map, out.expanduser().absolute(), wanted.layout)


def export_network(weights: Path, out: Path, trust: bool = False) -> tuple[LoadedNetwork, dict[tuple[int, int], float]]:
    """Write an SR network as ONNX.

    Returns:
        The network, and per image size the largest difference between the file's images and PyTorch's.

    Raises:
        StorageError: the weights are a damaged artifact.
        InputError: no such weights, or ``out`` already exists or is not an ``.onnx`` file.
        ConfigError: the network cannot be written as ONNX.
    """
    if out.suffix.lower() != ".onnx":
        fix = "name a .onnx file; a train_sr folder has weights.pth and weights.safetensors for other programs"
        raise InputError(
            f"{out.suffix or 'a file without suffix'} is not a format that this command writes", where=out, fix=fix
        )
    if out.exists():
        raise InputError("the output file already exists", where=out, fix="name another file, or remove this one")
    require_whole(weights)
    network = load_network(weights.expanduser(), trust)
    with storage_errors(out.parent):
        return network, export_onnx(network.module, out.expanduser())


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
