"""Training a generator against a discriminator: Real-ESRGAN (Wang et al. 2021) and RealSR (Ji et al. 2020).

Both rows of the paper use plain bicubic LR, so they differ in the discriminator and in the weights of the losses alone
(`recipes.GAN_RECIPES`). A run starts with L1 alone; the discriminator joins the averaged weights of that phase, as
Real-ESRGAN starts from Real-ESRNet. Whatever maps LR to HR can be the generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ddsr_core.config import StageConfig
from ddsr_core.errors import ConfigError
from ddsr_core.sr.optim import descend, new_adam
from ddsr_core.sr.recipes import GAN_RECIPES, GanName, GanRecipe
from ddsr_core.storage.files import sha256_of
from ddsr_core.storage.stage import Source

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ddsr_core.sr.perceptual import Perceptual

#: Columns of the curves: the generator's losses with their weights, their sum, and the discriminator's.
TERMS = ("loss", "l1", "perceptual", "adversarial", "discriminator")
#: What `adversarial_step` returns, for messages: `TERMS` and both gradients' norms.
WATCHED = (
    "sum of the losses",
    "L1 loss",
    "perceptual loss",
    "adversarial loss",
    "loss of the discriminator",
    "gradient of the generator",
    "gradient of the discriminator",
)


class GanConfig(StageConfig):
    """What makes a training adversarial; the generator's own fields stand beside it."""

    recipe: GanName = Field(description="discriminator, losses and their weights, rates of the second phase")
    warmup: float = Field(0.5, ge=0, lt=1, description="share of the iterations with L1 alone, before the discriminator")
    learning_rate: float | None = Field(
        None, gt=0, le=1, description="of both networks once there are two; None: the recipe's, 1e-4"
    )
    discriminator: Literal["unet", "vgg"] | None = Field(
        None, description="None: the recipe's; vgg wants crops of 128 or 256 px, unet takes any multiple of 8"
    )
    discriminator_channels: int = Field(64, ge=1, le=512, description="of its first layer")
    trunk: Literal["any", "vgg19", "vgg16", "none"] = Field(
        "any",
        description="perceptual network: any takes VGG19, or VGG16 where only that is there; none leaves the loss out",
    )
    trunk_file: str | None = Field(None, description="its weights (.pth or .safetensors, torchvision's names)")

    @property
    def published(self) -> GanRecipe:
        recipe = GAN_RECIPES[self.recipe]
        return recipe._replace(discriminator=self.discriminator or recipe.discriminator)


@dataclass
class Adversary:
    """What teachers the generator.

    Attributes:
        discriminator: ``(B, 3, H, W)`` to logits, one a pixel or one an image.
        optimizer: of the discriminator.
        perceptual: frozen; None where the config leaves it out.
        recipe: losses and weights.
        facts: which perceptual trunk it is, for ``model.json``.
    """

    discriminator: nn.Module
    optimizer: torch.optim.Optimizer
    perceptual: Perceptual | None
    recipe: GanRecipe
    facts: dict[str, str]


def trunk_source(config: GanConfig | None) -> Source | None:
    """The file of the perceptual trunk as a further input of the stage, so that its content enters the key.

    Raises:
        MissingWeightsError: there is none, or not the one that the config demands.
    """
    if config is None or config.trunk == "none":
        return None
    from ddsr_core.sr.perceptual import find_trunk

    file = find_trunk(config.trunk, Path(config.trunk_file).expanduser() if config.trunk_file else None)
    return Source(file, sha256_of(file))


def new_adversary(config: GanConfig, hr_px: int, trunk: Path | None, device: str) -> Adversary:
    """A discriminator with random weights (torch's global generator) for crops of ``hr_px``, and the perceptual loss.

    Raises:
        ConfigError: crops that the discriminator cannot take.
        MissingWeightsError, InputError: no trunk, or one that cannot be used.
    """
    import torch

    recipe = config.published
    discriminator = new_discriminator(recipe.discriminator, config.discriminator_channels, hr_px)
    discriminator = discriminator.to(device).to(memory_format=torch.channels_last).train()
    perceptual, facts = None, {"trunk": "none", "source": "left out by the config"}
    if config.trunk != "none":
        from ddsr_core.sr.perceptual import Perceptual, find_trunk, load_trunk

        given = Path(config.trunk_file).expanduser() if config.trunk_file else None
        weights = load_trunk(trunk or find_trunk(config.trunk, given), config.trunk)
        perceptual = Perceptual(weights, recipe.blocks).to(device).to(memory_format=torch.channels_last)
        facts = {"trunk": weights.name, "source": weights.source}
    optimizer = new_adam(discriminator, recipe.adversarial.learning_rate, recipe.beta2)
    return Adversary(discriminator, optimizer, perceptual, recipe, facts)


def new_discriminator(kind: Literal["unet", "vgg"], channels: int, hr_px: int) -> nn.Module:
    """basicsr's U-Net with spectral norm (Real-ESRGAN) or VGG-style network (RealSR's DF2K track).

    Raises:
        ConfigError: crops that it cannot take.
    """
    from ddsr_core.sr.basicsr_compat import import_basicsr

    networks = import_basicsr("archs.discriminator_arch")
    fitting = hr_px % 8 == 0 if kind == "unet" else hr_px in (128, 256)
    if not fitting:
        sizes = "a multiple of 2" if kind == "unet" else "32 or 64"
        raise ConfigError(
            f"the discriminator cannot take crops of {hr_px} px", where="lr_patch_px", fix=f"set lr_patch_px to {sizes}"
        )
    if kind == "unet":
        unet: nn.Module = networks.UNetDiscriminatorSN(3, channels)
        return unet
    vgg: nn.Module = networks.VGGStyleDiscriminator(3, channels, input_size=hr_px)
    last = vgg.get_submodule("bn4_1" if hr_px == 128 else "bn5_1")
    last.register_forward_hook(lambda module, inputs, output: output.contiguous())  # it views what it flattens
    return vgg


def adversarial_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    adversary: Adversary,
    lr: Tensor,
    hr: Tensor,
    rate: float,
    grad_clip: float,
    bf16: bool,
) -> Tensor:
    """One step of the generator, then one of the discriminator on the same crops.

    Args:
        network: the generator.
        optimizer: of the generator.
        adversary: discriminator, its optimizer, and the losses.
        lr, hr: float32 ``(B, 3, p, p)`` and ``(B, 3, 4p, 4p)`` in [0, 1].
        rate: learning rate of both.
        grad_clip: largest norm of either gradient.
        bf16: whether the networks run in bfloat16; losses are float32 in any case.

    Returns:
        float32 ``(7,)``: `TERMS` and the norms of both gradients, on the device.
    """
    import torch
    import torch.nn.functional as F

    recipe, discriminator = adversary.recipe, adversary.discriminator
    discriminator.requires_grad_(False)
    with torch.autocast(lr.device.type, torch.bfloat16, enabled=bf16):
        sr = network(lr).float()
        fake = discriminator(sr).float()
        with torch.no_grad():
            real = discriminator(hr).float() if recipe.relativistic else None
        perceptual = adversary.perceptual(sr, hr) if adversary.perceptual else sr.new_zeros(())
    terms = [
        recipe.l1 * F.l1_loss(sr, hr),
        recipe.perceptual * perceptual,
        recipe.gan * generator_loss(fake, real),
    ]
    loss = torch.stack(terms).sum()
    norm = descend(loss, network, optimizer, rate, grad_clip)

    discriminator.requires_grad_(True)
    with torch.autocast(lr.device.type, torch.bfloat16, enabled=bf16):
        real, fake = discriminator(hr).float(), discriminator(sr.detach()).float()
    compared = discriminator_loss(fake, real, recipe.relativistic)
    judged_norm = descend(compared, discriminator, adversary.optimizer, rate, grad_clip)
    return torch.stack([loss, *terms, compared, norm, judged_norm]).detach()


def generator_loss(fake: Tensor, real: Tensor | None) -> Tensor:
    """Cross-entropy of logits of SR crops with the answer "real".

    With ``real`` (logits of HR crops, detached) the relativistic average form: SR is to look more real than HR does on
    average, and HR less (Jolicoeur-Martineau 2018).
    """
    from torch.nn.functional import softplus

    if real is None:
        return softplus(-fake).mean()
    return (softplus(real - fake.mean()).mean() + softplus(real.mean() - fake).mean()) / 2


def discriminator_loss(fake: Tensor, real: Tensor, relativistic: bool) -> Tensor:
    """Cross-entropy of logits of SR crops with "fake" and of HR crops with "real".

    Relativistic: each is compared with the average of the other, which gets no gradient, and the two are halved.
    """
    from torch.nn.functional import softplus

    if not relativistic:
        return softplus(-real).mean() + softplus(fake).mean()
    return (softplus(fake.mean().detach() - real).mean() + softplus(fake - real.mean().detach()).mean()) / 2
