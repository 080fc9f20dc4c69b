"""Base models: a DiT, the VAE whose latents it works on, and the facts that tie them together.

A base folder holds ``ddsr_base.json`` (`BaseInfo`), ``transformer.safetensors`` (original DiT layout) and ``vae/``
(diffusers). ``ddsr-tiny`` is shipped in the package.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ddsr_core.config import digest_of
from ddsr_core.errors import InputError, MissingWeightsError
from ddsr_core.store import Source, sha256_of

if TYPE_CHECKING:
    from torch import Tensor

    from ddsr_core.diffusion.dit import DiT

INFO = "ddsr_base.json"
TRANSFORMER = "transformer.safetensors"
TINY = "ddsr-tiny"
SHIPPED = Path(__file__).resolve().parent.parent / "weights"


class BaseInfo(BaseModel):
    """Contents of ``ddsr_base.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    image_px: int = Field(description="height and width of the images it makes")
    dit: dict[str, Any] = Field(description="fields of DiTConfig")
    vae_class: str = Field(description="AutoencoderTiny or AutoencoderKL, of diffusers")
    latent_shift: tuple[float, ...] = Field(description="subtracted from a VAE latent, per channel")
    latent_scale: tuple[float, ...] = Field(description="then multiplied, per channel")
    licence: str = ""


@dataclass(frozen=True)
class Base:
    """A loaded base model.

    Attributes:
        dit: the noise predictor, without gammas.
        vae: the diffusers autoencoder, frozen, in evaluation mode, float32.
        info: facts; ``digest``: of the files.
    """

    dit: DiT
    vae: Any
    info: BaseInfo
    digest: str

    @property
    def image_px(self) -> int:
        return self.info.image_px

    @property
    def null_row(self) -> int:
        return self.dit.config.null_row

    def _per_channel(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        import torch

        return torch.tensor(values, device=like.device, dtype=like.dtype)[None, :, None, None]

    def encode(self, images: Tensor) -> Tensor:
        """``float (B, 3, H, W)`` in [-1, 1] to diffusion latents ``(B, C, h, w)`` of about unit variance.

        A Kullback-Leibler VAE gives its posterior's mean.
        """
        latents = (
            self.vae.encoder(images)
            if self.info.vae_class == "AutoencoderTiny"
            else self.vae.encode(images).latent_dist.mode()
        )
        return (latents - self._per_channel(self.info.latent_shift, latents)) * self._per_channel(
            self.info.latent_scale, latents
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Inverse of `encode`: images ``(B, 3, H, W)``, about [-1, 1], not clamped; differentiable."""
        raw = latents / self._per_channel(self.info.latent_scale, latents) + self._per_channel(
            self.info.latent_shift, latents
        )
        return self.vae.decoder(raw) if self.info.vae_class == "AutoencoderTiny" else self.vae.decode(raw).sample


def base_folder(name_or_path: str) -> Path:
    """The folder of ``ddsr-tiny`` or of a base model on disk.

    Raises:
        MissingWeightsError: there is no such folder, or no base model in it.
    """
    folder = SHIPPED / TINY if name_or_path == TINY else Path(name_or_path).expanduser()
    needed = (INFO, TRANSFORMER, "vae/config.json", "vae/diffusion_pytorch_model.safetensors")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise MissingWeightsError(
            f"no base model {name_or_path!r}: {', '.join(missing)} not found",
            where=folder,
            mend=f"name a folder with {', '.join(needed)} as `base`, or use base={TINY!r}, which is shipped in the package",
        )
    return folder


def base_source(name_or_path: str) -> Source:
    """The base model as a stage input: its digest is that of its files, wherever they lie."""
    folder = base_folder(name_or_path)
    files = (INFO, TRANSFORMER, "vae/config.json", "vae/diffusion_pytorch_model.safetensors")
    return Source(folder, digest_of({name: sha256_of(folder / name) for name in files}))


def read_info(folder: Path) -> BaseInfo:
    """The facts of a base folder.

    Raises:
        InputError: ``ddsr_base.json`` is not what it should be.
    """
    try:
        return BaseInfo.model_validate(json.loads((folder / INFO).read_text()))
    except (ValueError, ValidationError) as error:
        raise InputError(f"not a base model description: {error}", where=folder / INFO) from error


def load_base(name_or_path: str, device: str = "cpu") -> Base:
    """Load a base model, frozen, in float32 and evaluation mode.

    Raises:
        MissingWeightsError: files are missing.
        InputError: the weights do not fit the description.
    """
    import diffusers
    from safetensors.torch import load_file

    from ddsr_core.diffusion.dit import DiT, DiTConfig

    folder = base_folder(name_or_path)
    info = read_info(folder)
    dit = DiT(DiTConfig.model_validate(info.dit))
    try:
        dit.load_state_dict({name: value.float() for name, value in load_file(folder / TRANSFORMER).items()})
    except RuntimeError as error:
        raise InputError(f"the weights do not fit the shape in {INFO}: {error}", where=folder / TRANSFORMER) from error
    vae = getattr(diffusers, info.vae_class).from_pretrained(folder / "vae", local_files_only=True).float()
    for module in (dit, vae):
        module.requires_grad_(False).eval().to(device)
    return Base(dit, vae, info, base_source(name_or_path).digest)


def save_base(folder: Path, info: BaseInfo, dit: DiT, vae: Any) -> None:
    """Write a base folder in half precision (`load_base` reads it back as float32)."""
    import torch
    from safetensors.torch import save_file

    from ddsr_core.store import write_json

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in dit.state_dict().items()}, folder / TRANSFORMER)
    vae.to(torch.float16).save_pretrained(folder / "vae")
    settings = json.loads((folder / "vae/config.json").read_text())
    settings.pop("block_out_channels", None)  # diffusers writes it and then warns that it does not know it
    write_json(folder / "vae/config.json", settings)
    write_json(folder / INFO, info.model_dump(mode="json"))
