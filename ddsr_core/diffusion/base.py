"""Base models: a DiT, the VAE whose latents it works on, and what ties them together.

Three layouts are read: our own base folder (``ddsr_base.json``, ``transformer.safetensors`` in the original DiT layout,
``vae/``), diffusers' (``transformer/``, ``vae/``; a folder or a hub id such as ``facebook/DiT-XL-2-512``), and a single
file of the original release (``DiT-XL-2-512x512.pt``; its VAE is named separately). ``ddsr-tiny`` ships in the package.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from ddsr_core.config import digest_of
from ddsr_core.diffusion import published
from ddsr_core.diffusion.codec import Codec, load_codec, load_vae
from ddsr_core.diffusion.dit import DiT, DiTConfig, position_table
from ddsr_core.diffusion.layouts import from_diffusers
from ddsr_core.errors import InputError, MissingWeightsError
from ddsr_core.storage.files import sha256_of, write_json
from ddsr_core.storage.stage import Source

INFO = "ddsr_base.json"
TRANSFORMER = "transformer.safetensors"
#: Beside the model, if `ddsr pretrain` made it: ``centers float32 (classes, 512)``, the k-means centers of its classes in
#: the features of `ddsr_core.pseudo_labels.patch_features`.
CLASSES = "classes.safetensors"
OWN_FILES = (INFO, TRANSFORMER, "vae/config.json", "vae/diffusion_pytorch_model.safetensors")
TINY = "ddsr-tiny"
SHIPPED = Path(__file__).resolve().parent.parent / "weights"
#: Attention heads of the published DiT widths, which a state dict does not reveal.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
DIT_LICENSE = (
    "the published DiT weights are CC-BY-NC-4.0 (non-commercial); whether that extends to their samples is an open question"
)


class BaseInfo(BaseModel):
    """Description of a base model: the contents of ``ddsr_base.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    image_px: int = Field(description="Height and width of its images, pixels.")
    dit: dict[str, Any] = Field(description="Fields of DiTConfig.")
    vae_class: str = Field(description="AutoencoderTiny or AutoencoderKL, of diffusers.")
    latent_shift: tuple[float, ...] = Field(description="Subtracted from a VAE latent, per channel.")
    latent_scale: tuple[float, ...] = Field(description="Multiplied with the result, per channel.")
    license: str = ""


@dataclass(frozen=True)
class Base:
    """A loaded base model.

    Attributes:
        dit: the noise predictor, without DiffFit scales.
        codec: images to latents and back.
        info: its description.
        digest: of the noise predictor's weights, independent of their layout on disk.
        class_names: row of the class table -> name, if the source has names (ImageNet's, for DiT-XL).
    """

    dit: DiT
    codec: Codec
    info: BaseInfo
    digest: str
    class_names: Mapping[int, str]

    @property
    def image_px(self) -> int:
        return self.info.image_px

    @property
    def null_row(self) -> int:
        return self.dit.config.null_row

    @property
    def vae(self) -> Any:
        return self.codec.vae

    def encode(self, images: Tensor) -> Tensor:
        """See `Codec.encode`."""
        return self.codec.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Codec.decode`."""
        return self.codec.decode(latents)


def locate_base(name_or_path: str) -> Path:
    """The folder or file of a base model; a hub id is downloaded once.

    Raises:
        MissingWeightsError: it does not exist; the message names the missing files.
    """
    path = SHIPPED / TINY if name_or_path == TINY else Path(name_or_path).expanduser()
    if path.is_file() and path.suffix in published.FILE_SUFFIXES:
        return path
    if not (path / INFO).is_file() and name_or_path != TINY:
        return published.locate(name_or_path, ("transformer", "vae"), "base")
    if missing := [name for name in OWN_FILES if not (path / name).is_file()]:
        raise MissingWeightsError(
            f"the base model {name_or_path!r} is incomplete: {', '.join(missing)} not found",
            where=path,
            fix=f"reinstall the package, or name another base ({TINY}, for 64-px patches, ships with it)",
        )
    return path


def base_source(name_or_path: str) -> Source:
    """The base model as a stage input. Its digest depends on its files, not on their path."""
    path = locate_base(name_or_path)
    return Source(path, _digest_of_files(path, _files_of(path)))


def vae_source(name_or_path: str, option: str = "vae") -> Source:
    """A VAE in diffusers' layout as a stage input.

    Args:
        name_or_path: a folder or a hub id.
        option: the config field that names it, for error messages.

    Raises:
        MissingWeightsError: it does not exist.
    """
    folder = published.locate(name_or_path, (".",), option)
    return Source(folder, _digest_of_files(folder, _model_files(folder)))


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        sidecar = path.with_suffix(".json")
        return [path, sidecar] if sidecar.is_file() else [path]
    if (path / INFO).is_file():
        centers = path / CLASSES
        return [*(path / name for name in OWN_FILES), *([centers] if centers.is_file() else [])]
    named = [path / "model_index.json"] if (path / "model_index.json").is_file() else []
    return [*named, *_model_files(path / "transformer"), *_model_files(path / "vae")]


def _model_files(folder: Path) -> list[Path]:
    weights = published.find_weights(folder)
    return [folder / published.CONFIG] + ([weights] if weights else [])


def _digest_of_files(root: Path, files: list[Path]) -> str:
    return digest_of({file.name if root.is_file() else str(file.relative_to(root)): sha256_of(file) for file in files})


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names and float32 values, in order of the names, without the fixed position table."""
    digest = hashlib.sha256()
    for name in sorted(state):
        if name != "pos_embed":
            digest.update(name.encode())
            digest.update(state[name].detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def load_base(name_or_path: str, device: str = "cpu", vae: Path | None = None) -> Base:
    """Load a base model, frozen, in float32 and evaluation mode.

    Args:
        vae: folder of a VAE that replaces the base model's own. Required for a single file of the original release, which
            has no VAE.

    Raises:
        MissingWeightsError: files are missing.
        InputError: the weights do not fit their description.
    """
    path = locate_base(name_or_path)
    if (path / INFO).is_file():
        return _assemble(device, *_read_own(path, vae))
    name = path.stem if path.is_file() else Path(name_or_path).name
    if path.is_file():
        config, state = _read_original(path)
    else:
        config, state = _read_diffusers(path / "transformer")
    folder = vae or (None if path.is_file() else path / "vae")
    if folder is None:
        raise MissingWeightsError(
            "a weights file of the original release comes without a VAE",
            where="vae",
            fix="set vae to a hub id such as stabilityai/sd-vae-ft-mse, or to its folder",
        )
    codec = load_codec(folder)
    info = BaseInfo(
        name=name, image_px=config.latent_px * codec.pixels_per_latent(), dit=config.model_dump(),
        vae_class=type(codec.vae).__name__, latent_shift=codec.shift, latent_scale=codec.scale,
        license=DIT_LICENSE if config.hidden in HEADS else "",
    )  # fmt: skip
    return _assemble(device, info, config, state, codec, path, _class_names(path))


def load_base_facts(path: Path) -> tuple[int, dict[int, str]]:
    """Number of classes of a base model, not counting the null row, and the names of their rows, if it has names."""
    if (path / INFO).is_file():
        return int(read_info(path).dit["classes"]), {}
    if path.is_file():
        return _read_original(path)[0].classes, {}
    classes = published.read_json(path / "transformer" / published.CONFIG)["num_embeds_ada_norm"]
    return int(classes), _class_names(path)


def has_class_centers(path: Path) -> bool:
    """Whether the classes of a base model are k-means clusters whose centers are known."""
    return (path / CLASSES).is_file()


def load_class_centers(path: Path) -> Tensor:
    """The centers ``float32 (classes, 512)`` of a base model's classes, one per row of its class table.

    Raises:
        InputError: it has none, or they do not fit its class table.
    """
    if not has_class_centers(path):
        raise InputError(
            "this base model has no class centers", where=path / CLASSES, fix="set finetune.class_row_init to null or auto"
        )
    centers = published.read_tensors(path / CLASSES).get("centers")
    classes = load_base_facts(path)[0]
    if centers is None or centers.ndim != 2 or len(centers) != classes:
        raise InputError(
            f"not the centers of {classes} classes",
            where=path / CLASSES,
            fix="copy the base folder again, with all its files",
        )
    return centers.float()


def _assemble(
    device: str,
    info: BaseInfo,
    config: DiTConfig,
    state: dict[str, Tensor],
    codec: Codec,
    where: Path,
    names: Mapping[int, str],
) -> Base:
    with torch.device("meta"):
        dit = DiT(config)
    state = {name: value.float() for name, value in state.items()}
    try:
        dit.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise InputError(f"the weights do not fit the shape of the DiT: {error}", where=where) from error
    digest = weights_digest(state)
    for module in (dit, codec.vae):
        module.requires_grad_(False).eval().to(device)
    return Base(dit, codec, info, digest, names)


def _read_own(folder: Path, vae: Path | None) -> tuple[BaseInfo, DiTConfig, dict[str, Tensor], Codec, Path, dict[int, str]]:
    info = read_info(folder)
    codec = load_codec(vae) if vae else Codec(load_vae(folder / "vae"), info.latent_shift, info.latent_scale)
    state = published.read_tensors(folder / TRANSFORMER)
    return info, DiTConfig.model_validate(info.dit), state, codec, folder, {}


def _read_original(path: Path) -> tuple[DiTConfig, dict[str, Tensor]]:
    """The shape follows from the tensors; the heads from a published width, or from ``{"heads": N}`` beside the file."""
    state = published.read_tensors(path)
    try:
        hidden, channels, patch, _ = state["x_embedder.proj.weight"].shape
        grid = round(state["pos_embed"].shape[1] ** 0.5)
        outputs = len(state["final_layer.linear.bias"]) // patch**2
        values = {
            "latent_px": grid * patch, "patch": patch, "in_channels": channels, "hidden": hidden,
            "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
            "mlp_ratio": len(state["blocks.0.mlp.fc1.bias"]) / hidden,
            "classes": len(state["y_embedder.embedding_table.weight"]) - 1, "learn_sigma": outputs == 2 * channels,
        }  # fmt: skip
    except (KeyError, ValueError) as error:
        raise InputError(
            f"not a DiT in the layout of the original release ({error})",
            where=path,
            fix="name a file such as DiT-XL-2-512x512.pt, or a folder in diffusers' layout",
        ) from error
    sidecar = path.with_suffix(".json")
    heads = published.read_json(sidecar).get("heads") if sidecar.is_file() else HEADS.get(hidden)
    if not isinstance(heads, int) or heads < 1 or hidden % heads:
        raise InputError(
            f"the number of attention heads of a DiT of width {hidden} does not follow from its weights",
            where=path,
            fix=f'write {{"heads": N}} into {sidecar.name} beside it',
        )
    return DiTConfig(**values, heads=heads), state


def _read_diffusers(folder: Path) -> tuple[DiTConfig, dict[str, Tensor]]:
    values = published.read_json(folder / published.CONFIG)
    weights = published.find_weights(folder)
    # Published configs still name the class from which diffusers split off DiT.
    is_dit = values.get("_class_name") in ("DiTTransformer2DModel", "Transformer2DModel")
    if not is_dit or values.get("norm_type", "ada_norm_zero") != "ada_norm_zero" or weights is None:
        raise InputError("not a DiT in diffusers' layout", where=folder / published.CONFIG, fix="name another base")
    heads, channels = values["num_attention_heads"], values["in_channels"]
    hidden, patch, side = heads * values["attention_head_dim"], values["patch_size"], values["sample_size"]
    state = published.read_tensors(weights)
    try:
        state = from_diffusers(state, position_table(hidden, side // patch))
    except (KeyError, ValueError) as error:
        raise InputError(
            f"the weights lack a part of the DiT: {error}", where=weights, fix="download the file again"
        ) from error
    config = DiTConfig(
        latent_px=side, patch=patch, in_channels=channels, hidden=hidden, heads=heads, depth=values["num_layers"],
        classes=len(state["y_embedder.embedding_table.weight"]) - 1,
        learn_sigma=(values.get("out_channels") or channels) == 2 * channels,
    )  # fmt: skip
    return config, state


def _class_names(path: Path) -> dict[int, str]:
    index = path / "model_index.json"
    if not index.is_file():
        return {}
    names = published.read_json(index).get("id2label") or {}
    return {int(row): str(name) for row, name in names.items()}


def read_info(folder: Path) -> BaseInfo:
    """The description of a base folder.

    Raises:
        InputError: ``ddsr_base.json`` is missing or invalid.
    """
    try:
        return BaseInfo.model_validate(json.loads((folder / INFO).read_text()))
    except (OSError, ValueError, ValidationError) as error:
        raise InputError(f"not a base model description: {error}", where=folder / INFO) from error


def save_base(folder: Path, info: BaseInfo, dit: DiT, vae: Any) -> None:
    """Write a base folder in half precision (`load_base` reads it back as float32)."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in dit.state_dict().items()}, folder / TRANSFORMER)
    vae.to(torch.float16).save_pretrained(folder / "vae")
    tidy_vae_config(folder / "vae")
    write_json(folder / INFO, info.model_dump(mode="json"))


def tidy_vae_config(folder: Path) -> None:
    """Remove from a saved VAE's config what diffusers warns about when loading it, and the path it was loaded from."""
    settings = published.read_json(folder / published.CONFIG)
    if settings["_class_name"] == "AutoencoderTiny":  # its own constructor sets this; AutoencoderKL needs it
        settings.pop("block_out_channels", None)
    settings.pop("_name_or_path", None)
    write_json(folder / published.CONFIG, settings)
