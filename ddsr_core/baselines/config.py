"""Configs of the training sets that a distilled set is compared with."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ddsr_core.config import StageConfig
from ddsr_core.imaging.kernel import Kernel, Scale
from ddsr_core.pseudo_labels.config import EmbeddingsConfig


class CropsConfig(StageConfig):
    """Real crops: random crops of the photos, or accepted patches."""

    kind: Literal["random", "threshold"] = Field(
        "random", description="random: crops from anywhere in the photos; threshold: patches accepted by PSNR_bic."
    )
    count: int = Field(420, ge=1, description="Number of images. Use that of the distilled set for a fair comparison.")
    patch_px: int = Field(512, ge=16, multiple_of=4, description="Height and width of the images in pixels.")
    scale: Scale = Field(4, description="Upsampling factor of the recorded PSNR_bic.")
    kernel: Kernel = Field("matlab", description="Bicubic kernel of the recorded PSNR_bic.")
    seed: int = Field(42, ge=0, lt=2**31, description="Seed of the choice.")


class RestoreConfig(StageConfig):
    """How much detail of real crops a teacher network replaces."""

    detail_restoration: float = Field(
        1.0,
        gt=0,
        le=1,
        description="How much of the detail to replace; the same value as for the distilled images. Filled in by the run.",
    )
    scale: Scale = Field(4, description="Upsampling factor of the recorded PSNR_bic.")
    kernel: Kernel = Field("matlab", description="Bicubic kernel of the recorded PSNR_bic.")


class SubsetConfig(StageConfig):
    """Which crops of a pool are chosen."""

    kind: Literal["k-center", "hdc", "loss-ranked"] = Field("k-center", description="How images are chosen.")
    count: int = Field(420, ge=1, description="Number of images. Use that of the distilled set for a fair comparison.")
    seed: int = Field(42, ge=0, lt=2**31, description="Seed of the choice, of k-means and of the SRCNN.")
    scale: Scale = Field(4, description="Upsampling factor of the SRCNN (loss-ranked).")
    embeddings: EmbeddingsConfig = Field(EmbeddingsConfig(), description="Feature network; filled in from the run.")
    clusters: int = Field(15, ge=1, le=1000, description="Number of texture clusters (hdc).")
    keep: float = Field(0.5, gt=0, le=1, description="Share of the pool that passes the filter (hdc, loss-ranked).")
    drop: float = Field(0.05, ge=0, lt=1, description="Share of the hardest crops that is left out (loss-ranked).")
    srcnn_steps: int = Field(400, ge=1, le=100_000, description="Training steps of the SRCNN (loss-ranked).")


class GSDDConfig(StageConfig):
    """How images are inverted from the generator of an SR-GAN."""

    count: int = Field(420, ge=1, description="Number of images. Use that of the distilled set for a fair comparison.")
    steps: int = Field(100, ge=0, le=100_000, description="Optimizer steps per class. 0 keeps the initial latents.")
    learning_rate: float = Field(0.01, gt=0, le=1, description="Learning rate of Adam on the latents, which are in [0, 1].")
    batch_real: int = Field(16, ge=1, le=1024, description="Real patches per step.")
    regularizer: float = Field(0.1, ge=0, description="Weight of the regularizer.")
    regularizer_form: Literal["initial", "pairs"] = Field(
        "initial",
        description="What the regularizer keeps small. initial: the distance between a latent and its initial value; pairs: "
        "the distance between the features of each image and those of a real patch of its own, so that the images of a "
        "class stay apart.",
    )
    init: Literal["real", "noise"] = Field(
        "real",
        description="Initial latents. real: LR images of patches; noise: noise with the mean and the deviation of the LR "
        "images of their class, so that no image starts from a real patch.",
    )
    scale: Scale = Field(4, description="Upsampling factor of the generator.")
    seed: int = Field(42, ge=0, lt=2**31, description="Seed of initial latents, batches and crops.")
