"""Models without weights: their shapes, from a config file or from what is published, and modules made of fake tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import open_clip
import torch
from torch import nn

from ddsr_core.diffusion import base as bases
from ddsr_core.diffusion import published
from ddsr_core.diffusion.base import Base, BaseInfo
from ddsr_core.diffusion.codec import Codec
from ddsr_core.diffusion.dit import DIT_XL_2_512, DiT, DiTConfig
from ddsr_core.errors import ConfigError
from ddsr_core.factories import load_factory
from ddsr_core.pseudo_labels.config import EmbeddingsConfig
from ddsr_core.pseudo_labels.embedders import OpenClipEmbedder, Vgg16Embedder
from ddsr_core.pseudo_labels.names import EMBEDDERS

SD_VAE: Mapping[str, Any] = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "in_channels": 3,
    "out_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 256,
}  # fmt: skip
TAESD: Mapping[str, Any] = {"_class_name": "AutoencoderTiny"}
#: Published models whose shape is known without a look at their files.
VAES = {
    "stabilityai/sd-vae-ft-mse": SD_VAE,
    "stabilityai/sd-vae-ft-ema": SD_VAE,
    "madebyollin/taesd": TAESD,
}
DITS = {
    "facebook/DiT-XL-2-512": DIT_XL_2_512,
    "facebook/DiT-XL-2-256": DIT_XL_2_512.model_copy(update={"latent_px": 32}),
}


@dataclass(frozen=True)
class BaseShape:
    """A base model without weights: its DiT, and the config of its VAE in diffusers' words."""

    name: str
    dit: DiTConfig
    vae: Mapping[str, Any]

    @property
    def factor(self) -> int:
        """Image pixels along one latent pixel."""
        blocks = self.vae.get("block_out_channels")
        return 2 ** (len(blocks) - 1) if blocks and self.vae["_class_name"] == "AutoencoderKL" else _tiny_factor(self.vae)

    @property
    def image_px(self) -> int:
        """Height and width of its images."""
        return self.dit.latent_px * self.factor


def _tiny_factor(vae: Mapping[str, Any]) -> int:
    """An ``AutoencoderTiny`` halves the image before every group of encoder blocks but the first."""
    return int(2 ** (len(vae.get("num_encoder_blocks", (1, 3, 3, 3))) - 1))


def base_shape(name: str, vae: str | None) -> BaseShape:
    """The shape of a base model, and of the VAE that replaces its own.

    Raises:
        ConfigError: the model is neither on this machine nor known.
    """
    if name in DITS:
        return BaseShape(name, DITS[name], vae_shape(vae, "vae") if vae else SD_VAE)
    path = bases.SHIPPED / bases.TINY if name == bases.TINY else Path(name).expanduser()
    if (path / bases.INFO).is_file():
        dit = DiTConfig.model_validate(bases.read_info(path).dit)
        return BaseShape(name, dit, vae_shape(vae or str(path / "vae"), "vae"))
    if path.is_file():
        return BaseShape(path.stem, _of_file(path), vae_shape(vae, "vae") if vae else SD_VAE)
    config = path / "transformer" / published.CONFIG
    if config.is_file():
        return BaseShape(path.name, _of_config(published.read_json(config)), vae_shape(vae or str(path / "vae"), "vae"))
    raise ConfigError(
        f"the shape of {name!r} is not known", where="base",
        fix=f"name a folder or a file on this machine, or one of: {', '.join(DITS)}, {bases.TINY}",
    )  # fmt: skip


def vae_shape(name: str, option: str) -> Mapping[str, Any]:
    """The config of a VAE: of a folder, or of a published one.

    Raises:
        ConfigError: neither.
    """
    if name in VAES:
        return VAES[name]
    config = Path(name).expanduser() / published.CONFIG
    if not config.is_file():
        raise ConfigError(
            f"the shape of {name!r} is not known", where=option,
            fix=f"name a folder on this machine, or one of: {', '.join(VAES)}",
        )  # fmt: skip
    return published.read_json(config)


def _of_file(path: Path) -> DiTConfig:
    """Of a file of the original release; the two published ones are known by their names."""
    known = {"DiT-XL-2-512x512": DITS["facebook/DiT-XL-2-512"], "DiT-XL-2-256x256": DITS["facebook/DiT-XL-2-256"]}
    return known[path.stem] if path.stem in known else bases._read_original(path)[0]


def _of_config(values: Mapping[str, Any]) -> DiTConfig:
    heads, channels = values["num_attention_heads"], values["in_channels"]
    return DiTConfig(
        latent_px=values["sample_size"], patch=values["patch_size"], in_channels=channels,
        hidden=heads * values["attention_head_dim"], heads=heads, depth=values["num_layers"],
        classes=values["num_embeds_ada_norm"], learn_sigma=(values.get("out_channels") or channels) == 2 * channels,
    )  # fmt: skip


def make_codec(vae: Mapping[str, Any]) -> Codec:
    """A VAE of that shape, frozen, with arbitrary weights."""
    values = {name: value for name, value in vae.items() if not name.startswith("_")}
    module = getattr(diffusers, vae["_class_name"])(**values).requires_grad_(False).eval()
    channels = module.config.latent_channels
    return Codec(module, (0.0,) * channels, (float(module.config.scaling_factor),) * channels)


def make_base(shape: BaseShape) -> Base:
    """A base model of that shape, frozen, with arbitrary weights."""
    codec = make_codec(shape.vae)
    info = BaseInfo(
        name=shape.name, image_px=shape.image_px, dit=shape.dit.model_dump(), vae_class=shape.vae["_class_name"],
        latent_shift=codec.shift, latent_scale=codec.scale,
    )  # fmt: skip
    return Base(DiT(shape.dit).requires_grad_(False).eval(), codec, info, "", {})


def make_embedder(config: EmbeddingsConfig) -> nn.Module:
    """The feature network of the config, with arbitrary weights; an embedder of your own with those that it loads.

    Raises:
        ConfigError: open_clip has no such architecture.
    """
    embedder: Any
    if config.backend == "vgg16":
        from torchvision.models import vgg16  # a second to import, and not wanted for open_clip

        embedder = _without_weights(Vgg16Embedder)
        embedder.image_px, embedder.features = config.image_px, vgg16(init_weights=False).features[:30]
    elif config.backend == "open_clip":
        if config.model not in open_clip.list_models():
            raise ConfigError(f"open_clip has no model {config.model!r}", where="embeddings.model")
        embedder = _without_weights(OpenClipEmbedder)
        with _quiet():  # it warns that the weights are random
            embedder.name, embedder.model = config.model, open_clip.create_model(config.model)
        size = open_clip.get_model_config(config.model)["vision_cfg"]["image_size"]
        embedder.image_px = int(size if isinstance(size, int) else size[0])
        embedder.mean, embedder.std = (0.5,) * 3, (0.5,) * 3
    else:
        embedder = load_factory(EMBEDDERS[config.backend].factory, "embeddings.backend")(config, None)
    module: nn.Module = embedder.eval().requires_grad_(False)
    return module.to(memory_format=torch.channels_last)


@contextmanager
def _quiet() -> Iterator[None]:
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)


def _without_weights(kind: type[Any]) -> Any:
    """A module whose constructor would read weights, before that."""
    module = object.__new__(kind)
    nn.Module.__init__(module)
    return module
