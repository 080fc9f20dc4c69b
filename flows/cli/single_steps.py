"""Single steps outside the whole pipeline: one training, one evaluation, a report, a search, a base model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel, ValidationError

from ddsr_core.config import Runtime
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.imaging.images import photo_source
from ddsr_core.pipeline.config import merge, parse_override
from ddsr_core.storage.store import Artifact, Source, Store, sha256_of, storage_errors
from flows.cli.console import progress_for
from flows.cli.device import resolve_device_lazily

if TYPE_CHECKING:
    from ddsr_core.evaluation.evaluate import EvaluateConfig
    from ddsr_core.sr.train import TrainSRConfig
    from ddsr_core.sr.weights import LoadedNetwork


def with_overrides(config: type[BaseModel], values: dict[str, Any], overrides: Iterable[str] = ()) -> Any:
    """A stage config from values and ``field=value`` texts.

    Raises:
        ConfigError: unknown field or value out of range.
    """
    for text in overrides:
        values = merge(values, parse_override(text))
    try:
        return config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        known = f"fields: {', '.join(config.model_fields)}"
        raise ConfigError(f"{field}: {first['msg']}", where="--set", mend=known) from error


@dataclass(frozen=True)
class Crops:
    """What of a data set a network is trained on.

    Attributes:
        source: a `ddsr_core.pipeline.config.SourceName`.
        budget: number of crops, where they are chosen.
        patch_px: height and width of crops, pixels.
        embeddings: features that k-centre and HDC compare crops by, ``vgg16`` or ``open_clip``.
    """

    source: str
    budget: int
    patch_px: int
    embeddings: str


def train_one(
    store: Store, data: Source, crops: Crops, *, arch: str, iterations: int, overrides: Iterable[str], device: str
) -> tuple[Artifact, bool]:
    """Train one network on ``data`` as it is, or on crops of it."""
    from ddsr_core.sr import train

    runtime = Runtime(device=resolve_device_lazily(device), progress=progress_for())
    config = with_overrides(train.TrainSRConfig, {"arch": arch, "iterations": iterations}, overrides)
    images = training_images(store, data, crops, runtime)
    config = fitted(config, images.path)
    return store.build(train.STAGE, config, {"data": images, **train.trunk_input(config)}, runtime)


def fitted(config: TrainSRConfig, data: Path) -> TrainSRConfig:
    """The published crop shrunk to the images where they are smaller than it, said on the terminal; else as it is."""
    from ddsr_core.imaging.images import iter_photos

    published = config.plan.lr_patch_px
    first = next(iter(iter_photos(data)), None)
    if config.lr_patch_px is not None or first is None:
        return config
    largest = min(first.read().shape[:2]) // config.scale
    if largest >= published:
        return config
    click.echo(f"ddsr: LR crops of {largest} px: the images are smaller than the published {published} px", err=True)
    return config.model_copy(update={"lr_patch_px": largest})


def training_images(store: Store, data: Source, wanted: Crops, runtime: Runtime) -> Artifact | Source:
    """Crops of ``data``; or ``data`` itself, where the source is everything there is, or images that a model drew."""
    from ddsr_core.baselines import crops as sources
    from ddsr_core.pipeline.config import PipelineConfig
    from ddsr_core.pipeline.stages import Chain, subset
    from ddsr_core.pseudo_labels import patches

    def build(stage: Any, config: Any, inputs: Any, label: str = "") -> tuple[Artifact, bool]:
        return store.build(stage, config, inputs, runtime)

    chain = Chain(build, log=lambda line: None)
    size = {"count": wanted.budget, "patch_px": wanted.patch_px}
    match wanted.source:
        case "random":
            return chain.add(sources.STAGE, with_overrides(sources.CropsConfig, {"kind": "random", **size}), photos=data)
        case "threshold" | "full-thresholded":
            stride_px = max(4, wanted.patch_px // 2 // 4 * 4)
            windows = with_overrides(patches.PatchesConfig, {"patch_px": wanted.patch_px, "stride_px": stride_px})
            accepted = chain.add(patches.STAGE, windows, photos=data)
            if wanted.source == "full-thresholded":
                return accepted
            return chain.add(
                sources.STAGE, with_overrides(sources.CropsConfig, {"kind": "threshold", **size}), patches=accepted
            )
        case "k-centre" | "hdc" | "loss-ranked":
            described = {"backend": wanted.embeddings, "image_px": min(224, max(32, wanted.patch_px))}
            count, patch_px = {"count": wanted.budget}, {"patch_px": wanted.patch_px}
            values = {"sample": count, "patches": patch_px, "embeddings": described, "finetune": {"row_start": None}}
            config = with_overrides(PipelineConfig, values)
            return subset(chain, wanted.source, config, data.path)
        case _:
            return data


def evaluate_networks(
    store: Store, weights: Iterable[str], test: Path, config: EvaluateConfig, device: str
) -> dict[str, Artifact]:
    """Measure weights files and ``train-sr`` folders, by the names given; bicubic comes first, named or not."""
    from ddsr_core.evaluation import evaluate as evaluation

    tests = photo_source(test)
    named = {name: weights_source(Path(name).expanduser()) for name in weights if name != evaluation.BICUBIC}
    runtime = Runtime(device=resolve_device_lazily(device), progress=progress_for())

    def measure(**inputs: Source) -> Artifact:
        return store.build(evaluation.STAGE, config, {"test": tests, **inputs}, runtime)[0]

    networks = {name: measure(weights=source) for name, source in named.items()}  # first: their weights may be damaged
    return {evaluation.BICUBIC: measure(), **networks}


def weights_source(path: Path) -> Source:
    """A weights file, or a folder with ``weights.safetensors``, as a stage input.

    Raises:
        InputError: neither.
    """
    file = path / "weights.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise InputError("no weights here", where=path, mend="name a weights file, a train-sr folder, or bicubic")
    return Source(path, sha256_of(file))


def export_model(store: Store, source: str, out: Path, kind: str, weights: str, base: str | None, vae: str | None) -> Path:
    """Export the fine-tuned model of a run, or an adapter's folder with its base.

    Raises:
        InputError: no such run or adapter, or the adapter's base is not named.
    """
    from ddsr_core.diffusion.base import base_source, vae_source
    from ddsr_core.diffusion.export import export
    from ddsr_core.sampling.sample import load_tuned

    adapter = Path(source).expanduser()
    if not (adapter / "adapter.json").is_file():
        adapter, run_base, run_vae = adapter_of_run(store, source)
        base, vae = base or run_base, vae or run_vae
    if base is None:
        raise InputError("an adapter needs its base model", where=adapter, mend="name it with --base")
    folder = vae_source(vae).path if vae else None
    model, label_map = load_tuned(adapter, base_source(base).path, weights, "cpu", folder)  # type: ignore[arg-type]
    return export(model, label_map, out.expanduser().absolute(), kind)  # type: ignore[arg-type]


def adapter_of_run(store: Store, name: str) -> tuple[Path, str, str | None]:
    """The adapter of a run, its base, and its VAE where it is not the base's.

    Raises:
        InputError: no such run, or it has not been fine-tuned yet.
    """
    import tomllib

    from ddsr_core.pipeline.runs import read_run, run_folder

    stages = {stage["name"]: stage["path"] for stage in read_run(store, name).get("stages", [])}
    if "finetune" not in stages:
        raise InputError("the run has no adapter yet", where=name, mend="finish the run first")
    config = tomllib.loads((run_folder(store, name) / "config.toml").read_text())
    return store.bring(Path(stages["finetune"])), config["base"], config.get("vae")


def export_network(weights: Path, out: Path) -> tuple[LoadedNetwork, dict[tuple[int, int], float]]:
    """Write an SR network as ONNX; returns it, and by image size how far the file's images are from PyTorch's.

    Raises:
        InputError: no such weights, or ``out`` is there already or no ``.onnx`` file.
        ConfigError: the network cannot be written as ONNX.
    """
    from ddsr_core.sr.onnx_export import export_onnx
    from ddsr_core.sr.weights import load_network

    if out.suffix.lower() != ".onnx":
        mend = "name a .onnx file; a train-sr folder has weights.pth and weights.safetensors for other programs"
        raise InputError(f"{out.suffix or 'a file without suffix'} is not written here", where=out, mend=mend)
    if out.exists():
        raise InputError("the output is already there", where=out, mend="name another file, or remove this one")
    network = load_network(weights.expanduser())
    with storage_errors(out.parent):
        return network, export_onnx(network.module, out.expanduser())


def pretrain_base(photos: Path | None, out: Path, overrides: Iterable[str]) -> Path:
    """Train a base model into the folder ``out``; what is needed to continue lies in ``out/resume`` until it is done."""
    import shutil

    from ddsr_core.pretrain import PretrainConfig
    from ddsr_core.pretrain.photographs import fetch_photographs
    from ddsr_core.storage.store import RESUME

    config = with_overrides(PretrainConfig, {}, overrides)
    runtime = Runtime(progress=progress_for())
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if photos is None:
            photos = fetch_photographs(out / RESUME / "photos", runtime.progress)
        from ddsr_core.pretrain.run import run

        run(config, photos=photos, out=out, runtime=runtime)
        shutil.rmtree(out / RESUME)
    return out


def search_run(
    store: Store, name: str, text: str | None, image: Path | None, count: int, sheet: Path | None
) -> list[dict[str, Any]]:
    """The patches of a run nearest to a text or an image; optionally as a contact sheet.

    Raises:
        InputError: the run has no clusters yet, or the image cannot be read.
        ConfigError: a text, but the run's feature network has no text tower.
    """
    from dataclasses import asdict

    from ddsr_core.imaging.contact_sheet import contact_sheet
    from ddsr_core.imaging.images import save_png
    from ddsr_core.pipeline.runs import read_run
    from ddsr_core.pseudo_labels import search
    from ddsr_core.pseudo_labels.embeddings import read_config

    paths = {stage["name"]: Path(stage["path"]) for stage in read_run(store, name).get("stages", [])}
    if "clusters" not in paths:
        raise InputError("the run has no clusters yet", where=name, mend="finish the run first")
    config = read_config(store.bring(paths["embeddings"]))
    query = search.text_query(text, config) if text is not None else search.image_query(image or Path(), config)
    hits = search.search(store.bring(paths["clusters"]), query, count)
    if sheet is not None:
        images = search.read_patches(store.bring(paths["patches"]), [hit.patch_id for hit in hits])
        save_png(sheet, contact_sheet(images, columns=6, px=128))
    return [asdict(hit) for hit in hits]
