"""Enlarging images and exporting models as named runs: listed by `ddsr runs`, and their weights kept by `ddsr gc`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ddsr_core.config import Runtime
from ddsr_core.diffusion.base import base_source, vae_source
from ddsr_core.diffusion.export import export, require_new_folder
from ddsr_core.errors import InputError
from ddsr_core.pipeline.request import name_of
from ddsr_core.pipeline.run_folder import artifact_paths, read_config
from ddsr_core.pipeline.run_state import complete_run
from ddsr_core.pipeline.stages import StageRun
from ddsr_core.pipeline.step_runs import open_step, set_name
from ddsr_core.sampling.sample import load_tuned
from ddsr_core.sr.onnx_export import export_onnx
from ddsr_core.sr.upscale import Existing, Upscaled, enlarge_all, plan_upscaling
from ddsr_core.sr.weights import LoadedNetwork, load_network
from ddsr_core.storage.files import storage_errors
from ddsr_core.storage.stage import Artifact, require_whole
from ddsr_core.storage.store import Store


class OutputRequest(BaseModel):
    """What the commands have in common that write files outside the home."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    output: Path = Field(description="File or folder to write.")
    run: str | None = Field(None, description="Name of the run below home/runs. Without it, command and input.")


class UpscaleRequest(OutputRequest):
    """Images to enlarge; the fields are the arguments of `ddsr_core.sr.upscale.upscale`."""

    images: Path = Field(description="An image, or a folder of images.")
    weights: Path = Field(description="A train_sr folder, one of its files, or any file that spandrel opens.")
    scale: int | None = Field(None, description="Upsampling factor that the weights must have.")
    tile_px: int = Field(512, ge=0, description="Side of the tiles of larger images, in input pixels; 0: no tiles.")
    existing: Existing = Field("refuse", description="What to do with outputs that already exist.")
    trust: bool = Field(False, description="Whether a weights file may import the user's own network (module:Class).")

    @property
    def run_name(self) -> str:
        """Name of the run: the user's, or else ``upscale-`` and the images."""
        return self.run or f"upscale-{set_name(self.images)}"


class ExportRequest(OutputRequest):
    """A fine-tuned diffusion model to export."""

    source: str = Field(description="Name of a run, or an adapter's folder.")
    layout: Literal["original", "diffusers"] = Field(
        "original", description="original: one file in the layout of the DiT release; diffusers: a folder."
    )
    weights: Literal["ema", "raw"] = Field("ema", description="ema: averaged weights; raw: those of the last step.")
    base: str | None = Field(None, description="Base model of an adapter that is exported without its run.")
    vae: str | None = Field(None, description="VAE, if not the one of the base model.")

    @property
    def run_name(self) -> str:
        """Name of the run: the user's, or else ``export-`` and the source."""
        return self.run or f"export-{name_of(Path(self.source))}"


class NetworkExportRequest(OutputRequest):
    """An SR network to write as ONNX."""

    weights: Path = Field(description="A train_sr folder, or a weights file.")
    trust: bool = Field(False, description="Whether a weights file may import the user's own network (module:Class).")

    @property
    def run_name(self) -> str:
        """Name of the run: the user's, or else ``export-`` and the file."""
        return self.run or f"export-{name_of(self.output)}"


@dataclass(frozen=True)
class Exported:
    """What an export has written, and the name of its run."""

    run: str
    output: Path


@dataclass(frozen=True)
class ExportedNetwork(Exported):
    """An SR network as ONNX.

    Attributes:
        network: as it was loaded.
        differences: image size -> largest difference between the file's images and PyTorch's.
    """

    network: LoadedNetwork
    differences: dict[tuple[int, int], float]


def run_upscale(request: UpscaleRequest, store: Store, runtime: Runtime) -> tuple[str, Upscaled]:
    """Enlarge images; returns the name of the run and what was written.

    Raises:
        InputError: as `ddsr_core.sr.upscale.upscale`. Wrong arguments are found before the run begins.
        StorageError: the home or the output cannot be written.
    """
    planned = plan_upscaling(
        request.images.expanduser(), request.output, request.weights, request.scale, request.existing, request.trust
    )
    about = f"{request.images} enlarged with {planned.network} x{planned.scale}"
    with open_output(request, store, "upscale", artifact_at(store, request.weights), str(request.images), about) as name:
        return name, enlarge_all(planned, request.tile_px, runtime)


def run_export(request: ExportRequest, store: Store) -> Exported:
    """Export the fine-tuned model of a run, or an adapter's folder with its base.

    Raises:
        InputError: no such run or adapter, the adapter's base is not named, or the output is not empty.
        StorageError: the adapter is damaged.
    """
    base, vae = request.base, request.vae
    adapter = Path(request.source).expanduser()
    if not (adapter / "adapter.json").is_file():
        config = read_config(store, request.source)
        adapter = artifact_paths(store, request.source, "finetune")["finetune"]
        base, vae = base or config["base"], vae or config.get("vae")
    require_whole(adapter)
    if base is None:
        raise InputError("an adapter needs its base model", where=adapter, fix="name it with --base")
    out = request.output.expanduser().absolute()
    require_new_folder(out)
    folder, source = vae_source(vae).path if vae else None, base_source(base).path
    about = f"fine-tuned model of {request.source}, {request.layout} layout, {request.weights} weights"
    with open_output(request, store, "export", artifact_at(store, adapter), request.source, about) as name:
        model, label_map = load_tuned(adapter, source, request.weights, "cpu", folder)
        return Exported(name, export(model, label_map, out, request.layout))


def run_network_export(request: NetworkExportRequest, store: Store) -> ExportedNetwork:
    """Write an SR network as ONNX.

    Raises:
        InputError: no such weights, or the output already exists or is not an ``.onnx`` file.
        ConfigError: the network cannot be written as ONNX.
        StorageError: the weights are a damaged artifact.
    """
    out = request.output.expanduser()
    if out.suffix.lower() != ".onnx":
        what = f"{out.suffix or 'a file without suffix'} is not a format that this command writes"
        fix = "name a .onnx file; a train_sr folder has weights.pth and weights.safetensors for other programs"
        raise InputError(what, where=out, fix=fix)
    if out.exists():
        raise InputError("the output file already exists", where=out, fix="name another file, or remove this one")
    weights = request.weights.expanduser()
    require_whole(weights)
    network = load_network(weights, request.trust)
    about = f"{network.name} x{network.scale} as ONNX"
    used = artifact_at(store, weights)
    with storage_errors(out.parent), open_output(request, store, "export-sr", used, str(weights), about) as name:
        return ExportedNetwork(name, out, network, export_onnx(network.module, out))


@contextmanager
def open_output(
    request: UpscaleRequest | ExportRequest | NetworkExportRequest,
    store: Store,
    kind: str,
    used: Artifact | None,
    source: str,
    about: str,
) -> Iterator[str]:
    """Begin a run that writes outside the home; yields its name. Its run.json names the artifact that it has used."""
    out = request.output.expanduser().absolute()
    identity = {"kind": kind, "images": source, "output": str(out), "weights": used.digest if used else None}
    with open_step(store, request, identity, request, about, wait=False) as step:
        if used:
            step.pins.add(used.key)
        yield step.name
        complete_run(store, step.name, [StageRun(used.manifest.stage, used, cached=True)] if used else [])


def artifact_at(store: Store, path: Path) -> Artifact | None:
    """The artifact of the home that a folder or one of its files belongs to; None for files from elsewhere."""
    place = path.expanduser().absolute()
    root = store.home / "artifacts"
    if not place.is_relative_to(root) or len(place.relative_to(root).parts) < 2:
        return None
    return store.find(*place.relative_to(root).parts[:2])
