"""Configs of SR training.

A field that is None takes the value published for the network (`ddsr_core.sr.recipes`).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, JsonValue

from ddsr_core.config import StageConfig
from ddsr_core.imaging.kernel import Scale
from ddsr_core.metrics.spec import MetricName

Schedule = Literal["cosine", "step"]
#: How LR images are made: MATLAB's bicubic reduction, or Real-ESRGAN's random degradations.
Degradation = Literal["bicubic", "real-esrgan"]
GanName = Literal["real-esrgan", "realsr"]
DiscriminatorName = Literal["unet", "vgg"]
#: Which perceptual trunk a config accepts: ``any`` is VGG19, or VGG16 where VGG19 is missing.
TrunkChoice = Literal["any", "vgg19", "vgg16", "none"]


class GanConfig(StageConfig):
    """Adversarial training: additional fields beside those of the generator."""

    recipe: GanName = Field(
        description="Published recipe: discriminator, losses with their weights, and learning rates of the second phase."
    )
    warmup: float = Field(
        0.5, ge=0, lt=1, description="Share of the iterations trained on L1 alone before the discriminator joins."
    )
    learning_rate: float | None = Field(
        None, gt=0, le=1, description="Learning rate of both networks in the second phase. Empty: the recipe's, 1e-4."
    )
    discriminator: DiscriminatorName | None = Field(
        None,
        description="Empty: the recipe's. vgg needs HR crops of 128 or 256 px; unet takes any multiple of 8 px.",
    )
    discriminator_channels: int = Field(
        64, ge=1, le=512, description="Channels of the discriminator's first layer. Lower it to save memory."
    )
    trunk: TrunkChoice = Field(
        "any",
        description="Network of the perceptual loss. any: VGG19, or VGG16 if VGG19 is not installed; none: no such loss.",
    )
    trunk_file: str | None = Field(
        None, description="Weights of the perceptual network (.pth or .safetensors with torchvision's names)."
    )


#: Default number of validations of a training with test photos.
VALIDATIONS = 10


class ValidationConfig(StageConfig):
    """Validation on test photos during training. It does not change the last weights unless it stops the training."""

    every: int = Field(1000, ge=1, description="Steps between validations. The last step is always validated.")
    metrics: tuple[MetricName, ...] = Field(
        ("psnr_y", "ssim_y"), min_length=1, description="Metrics to measure. The first one decides which weights are best."
    )
    early_stop: int | None = Field(
        None, ge=1, description="Stop after this many validations without a new best. Empty: train all iterations."
    )
    pictures: int = Field(4, ge=0, le=64, description="Test photos shown in each validation picture.")


class TrainSRConfig(StageConfig):
    """How one SR network is trained. Empty fields take the values published for the network."""

    keyed_if_set: ClassVar[frozenset[str]] = frozenset({"processes"})

    arch: str = Field("srformer-light", description="Name of the network, or module:Class of your own.")
    arch_kwargs: dict[str, JsonValue] = Field({}, description="Arguments of the network that override its defaults.")
    scale: Scale = Field(4, description="Upsampling factor.")
    degradation: Degradation = Field(
        "bicubic",
        description="How LR images are made. bicubic: MATLAB's, as benchmarks do; real-esrgan: random blur, resizing, noise "
        "and JPEG, for photos of unknown quality.",
    )
    gan: GanConfig | None = Field(None, description="Train against a discriminator. Empty: L1 loss alone.")
    iterations: int = Field(
        100_000, ge=1, description="Optimizer steps. Every training set that is compared gets the same number."
    )
    batch_size: int | None = Field(None, ge=1, le=1024, description="Crops per step. Lower it if memory runs out.")
    lr_patch_px: int | None = Field(
        None, ge=4, le=512, description="Height and width of the LR crops. The HR crops are larger by the scale."
    )
    learning_rate: float | None = Field(None, gt=0, le=1, description="Peak learning rate of Adam on the L1 loss.")
    schedule: Schedule | None = Field(
        None,
        description="cosine: decay to zero; step: halve the learning rate at the published steps, scaled to `iterations`.",
    )
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="Decay of the averaged weights, after warm-up. 0 keeps the last weights instead."
    )
    grad_clip: float = Field(1.0, gt=0, description="Largest gradient norm. Lower it if the loss diverges.")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="Precision of the trunk. The last convolution and the loss are always float32."
    )
    compile: bool = Field(
        False, description="Compile the network with torch.compile. Takes a minute or more; turn it on for long trainings."
    )
    processes: int = Field(
        1, ge=1, le=64, description="Processes that share every batch, one per GPU. The batch size must be a multiple of it."
    )
    validation: ValidationConfig | None = Field(
        None, description="Validate on test photos during training and keep the best weights. Empty: no validation."
    )
    checkpoint_every: int = Field(
        1000, ge=1, description="Steps between checkpoints that an interrupted training resumes from."
    )
    seed: int = Field(42, ge=0, lt=2**31, description="Seed of weights, crops and flips.")
