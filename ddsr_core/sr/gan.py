"""Training a generator against a discriminator: Real-ESRGAN (Wang et al. 2021) and RealSR (Ji et al. 2020).

Both rows of the paper use plain bicubic LR images, so they differ only in the discriminator and in the weights of the
losses (`recipes.GAN_RECIPES`). Training starts on L1 alone. The second phase then continues from the averaged weights of
the first, as Real-ESRGAN starts from Real-ESRNet. Any network that maps LR to HR can be the generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import softplus

from ddsr_core.distributed import ProcessGroup
from ddsr_core.errors import ConfigError
from ddsr_core.sr.basicsr_compat import import_basicsr
from ddsr_core.sr.config import DiscriminatorName, GanConfig
from ddsr_core.sr.optim import ONE_PROCESS, descend, new_adam
from ddsr_core.sr.perceptual import Perceptual, find_trunk, load_trunk
from ddsr_core.sr.recipes import GanRecipe, gan_recipe
from ddsr_core.storage.files import sha256_of
from ddsr_core.storage.stage import Source

#: Columns of the curves: sum of the generator's weighted losses, each of them, and the discriminator's loss.
TERMS = ("loss", "l1", "perceptual", "adversarial", "discriminator")
#: What `adversarial_step` returns: `TERMS` and both gradient norms, as messages name them.
WATCHED = (
    "sum of the losses",
    "L1 loss",
    "perceptual loss",
    "adversarial loss",
    "loss of the discriminator",
    "gradient of the generator",
    "gradient of the discriminator",
)


@dataclass
class Adversary:
    """What the generator is trained against.

    Attributes:
        discriminator: ``(B, 3, H, W)`` to logits, one per pixel or one per image.
        optimizer: of the discriminator.
        perceptual: the frozen perceptual loss; None if the config leaves it out.
        recipe: losses and their weights.
        facts: name and origin of the perceptual trunk, for ``model.json``.
    """

    discriminator: nn.Module
    optimizer: torch.optim.Optimizer
    perceptual: Perceptual | None
    recipe: GanRecipe
    facts: dict[str, str]


def trunk_source(config: GanConfig | None) -> Source | None:
    """The weights file of the perceptual loss as an input of the stage, so that its content enters the key.

    Raises:
        MissingWeightsError: no such file, or not of the network that the config demands.
    """
    if config is None or config.trunk == "none":
        return None
    file = find_trunk(config.trunk, Path(config.trunk_file).expanduser() if config.trunk_file else None)
    return Source(file, sha256_of(file))


def new_adversary(config: GanConfig, lr_px: int, scale: int, trunk: Path | None, device: str) -> Adversary:
    """A discriminator with random weights (torch's global generator), and the perceptual loss.

    Args:
        config: recipe.
        lr_px: height and width of the LR crops.
        scale: upsampling factor. The discriminator sees crops of ``scale * lr_px``.
        trunk: weights file of the perceptual loss; located automatically if None.
        device: torch device.

    Raises:
        ConfigError: the discriminator cannot take crops of that size.
        MissingWeightsError, InputError: the perceptual trunk is missing or cannot be used.
    """
    recipe = gan_recipe(config)
    discriminator = new_discriminator(recipe.discriminator, config.discriminator_channels, lr_px, scale)
    discriminator = discriminator.to(device).to(memory_format=torch.channels_last).train()
    perceptual, facts = None, {"trunk": "none", "source": "left out by the config"}
    if config.trunk != "none":
        given = Path(config.trunk_file).expanduser() if config.trunk_file else None
        weights = load_trunk(trunk or find_trunk(config.trunk, given), config.trunk)
        perceptual = Perceptual(weights, recipe.blocks).to(device).to(memory_format=torch.channels_last)
        facts = {"trunk": weights.name, "source": weights.source}
    optimizer = new_adam(discriminator, recipe.adversarial.learning_rate, recipe.beta2)
    return Adversary(discriminator, optimizer, perceptual, recipe, facts)


def new_discriminator(kind: DiscriminatorName, channels: int, lr_px: int, scale: int = 4) -> nn.Module:
    """basicsr's U-Net with spectral norm (Real-ESRGAN) or its VGG-style network (RealSR, DF2K track).

    Raises:
        ConfigError: it cannot take HR crops of ``scale * lr_px``.
    """
    hr_px = lr_px * scale
    networks = import_basicsr("archs.discriminator_arch")
    fitting = hr_px % 8 == 0 if kind == "unet" else hr_px in (128, 256)
    if not fitting:
        sizes = [px // scale for px in (128, 256) if px % scale == 0]
        fix = f"set lr_patch_px to {' or '.join(map(str, sizes))}" if sizes else "set gan.discriminator to unet"
        fix = f"set lr_patch_px to a multiple of {8 // math.gcd(8, scale)}" if kind == "unet" else fix
        raise ConfigError(f"the discriminator cannot take crops of {hr_px} px", where="lr_patch_px", fix=fix)
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
    group: ProcessGroup = ONE_PROCESS,
) -> Tensor:
    """One step of the generator, then one step of the discriminator on the same crops.

    Args:
        network: the generator.
        optimizer: of the generator.
        adversary: discriminator, its optimizer, and the losses.
        lr, hr: float32 ``(B, 3, p, p)`` and ``(B, 3, scale p, scale p)`` in [0, 1].
        rate: learning rate of both networks.
        grad_clip: largest gradient norm of either network.
        bf16: whether the networks run in bfloat16. Losses are always float32.
        group: processes that share the step. The means of a relativistic loss run over the part of each process.

    Returns:
        float32 ``(7,)`` on the device: `TERMS` and both gradient norms.
    """
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
    norm = descend(loss, network, optimizer, rate, grad_clip, group)

    discriminator.requires_grad_(True)
    with torch.autocast(lr.device.type, torch.bfloat16, enabled=bf16):
        real, fake = discriminator(hr).float(), discriminator(sr.detach()).float()
    discriminator_term = discriminator_loss(fake, real, recipe.relativistic)
    discriminator_norm = descend(discriminator_term, discriminator, adversary.optimizer, rate, grad_clip, group)
    return torch.stack([loss, *terms, discriminator_term, norm, discriminator_norm]).detach()


def generator_loss(fake: Tensor, real: Tensor | None) -> Tensor:
    """Cross-entropy between the logits of SR crops and the label "real".

    With ``real`` (logits of HR crops, detached) it is the relativistic average loss (Jolicoeur-Martineau 2018): SR should
    look more real than HR does on average, and HR less real than SR.
    """
    if real is None:
        return softplus(-fake).mean()
    return (softplus(real - fake.mean()).mean() + softplus(real.mean() - fake).mean()) / 2


def discriminator_loss(fake: Tensor, real: Tensor, relativistic: bool) -> Tensor:
    """Cross-entropy between the logits of SR crops and "fake", plus that of HR crops and "real".

    If relativistic, each kind is compared with the detached average of the other, and the sum is halved.
    """
    if not relativistic:
        return softplus(-real).mean() + softplus(fake).mean()
    return (softplus(fake.mean().detach() - real).mean() + softplus(fake - real.mean().detach()).mean()) / 2
