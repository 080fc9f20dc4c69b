"""Single steps outside the whole pipeline: one training, one evaluation, a report, a search, a base model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from ddsr_core.config import Runtime
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.images import photo_source
from ddsr_core.pipeline import merge, parse_override
from ddsr_core.store import Artifact, Source, Store, sha256_of
from flows.console import progress_for
from flows.device import resolve_device_lazily

if TYPE_CHECKING:
    from ddsr_core.evaluation import EvaluateConfig


def with_overrides(config: type[BaseModel], values: dict[str, Any], overrides: Iterable[str]) -> Any:
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


def train_one(
    store: Store, data: Source, *, arch: str, source: str, budget: int, patch_px: int, iterations: int,
    overrides: Iterable[str], device: str,
) -> tuple[Artifact, bool]:  # fmt: skip
    """Train one network on ``data`` as it is, or on crops of it."""
    from ddsr_core import patches
    from ddsr_core.sr import sources, train

    runtime = Runtime(device=resolve_device_lazily(device), progress=progress_for())
    config = with_overrides(train.TrainSRConfig, {"arch": arch, "iterations": iterations, "lr_patch_px": 16}, overrides)
    images: Artifact | Source = data
    if source == "random":
        crops = sources.CropsConfig(kind="random", count=budget, patch_px=patch_px)
        images, _ = store.build(sources.STAGE, crops, {"photos": data}, runtime)
    elif source == "threshold":
        windows = patches.PatchesConfig(patch_px=patch_px, stride_px=max(4, patch_px // 2 // 4 * 4))
        accepted, _ = store.build(patches.STAGE, windows, {"photos": data}, runtime)
        crops = sources.CropsConfig(kind="threshold", count=budget, patch_px=patch_px)
        images, _ = store.build(sources.STAGE, crops, {"patches": accepted}, runtime)
    return store.build(train.STAGE, config, {"data": images, **train.trunk_input(config)}, runtime)


def evaluate_networks(
    store: Store, weights: Iterable[str], test: Path, config: EvaluateConfig, device: str
) -> dict[str, Artifact]:
    """Measure weights files and ``train-sr`` folders, by the names given; bicubic comes first, named or not."""
    from ddsr_core import evaluation

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
    from ddsr_core.sampling import load_tuned

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

    from flows.runs import read_run, run_folder

    stages = {stage["name"]: stage["path"] for stage in read_run(store, name).get("stages", [])}
    if "finetune" not in stages:
        raise InputError("the run has no adapter yet", where=name, mend="finish the run first")
    config = tomllib.loads((run_folder(store, name) / "config.toml").read_text())
    return store.bring(Path(stages["finetune"])), config["base"], config.get("vae")


def pretrain_base(photos: Path | None, out: Path, overrides: Iterable[str]) -> Path:
    """Train a base model into the folder ``out``; what is needed to continue lies in ``out/resume`` until it is done."""
    import shutil

    from ddsr_core.pretrain import PretrainConfig
    from ddsr_core.pretrain.wallpapers import fetch_wallpapers
    from ddsr_core.store import RESUME, storage_errors

    config = with_overrides(PretrainConfig, {}, overrides)
    runtime = Runtime(progress=progress_for())
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if photos is None:
            photos = fetch_wallpapers(out / RESUME / "photos", runtime.progress)
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

    from ddsr_core import search
    from ddsr_core.embeddings import read_config
    from ddsr_core.images import save_png
    from ddsr_core.sheets import contact_sheet
    from flows.runs import read_run

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
