"""Config of `ddsr pretrain`: the defaults are the recipe of the published `ddsr-tiny`."""

from __future__ import annotations

from pydantic import Field

from ddsr_core.config import StageConfig


class PretrainConfig(StageConfig):
    """How `ddsr-tiny` is trained: patches, autoencoder (two phases), classes, diffusion prior."""

    image_px: int = Field(64, ge=16, multiple_of=8, description="height and width of the images it will make")
    stride_px: int = Field(16, ge=1, description="distance of neighbouring training windows, pixels")
    below_db: float = Field(30.0, gt=0, description="keep windows with a PSNR_bic below this, dB")
    short_sides_px: tuple[int, ...] = Field(
        (1200, 850, 600, 420),
        description="each photo is used at these short sides, where that makes it smaller",
    )
    least_reduction: float = Field(1.9, ge=1, description="smallest reduction of a photo: hides compression marks")
    most_patches: int = Field(48_000, ge=64, description="at most so many patches, drawn at random")

    vae_channels: int = Field(32, ge=8, description="width of the autoencoder")
    vae_steps: int = Field(5_000, ge=1, description="steps of phase 1: encoder and decoder")
    decoder_steps: int = Field(2_700, ge=0, description="steps of phase 2: decoder with the adversarial term")
    vae_batch: int = Field(16, ge=1, description="patches a step")
    vae_learning_rate: float = Field(2e-3, gt=0, description="phase 1, cosine; phase 2 starts at a quarter of it")
    latent_noise: float = Field(0.05, ge=0, description="standard deviation of the noise on latents, autoencoder training")
    weight_edge: float = Field(1.0, ge=0, description="weight of the edge term")
    weight_lpips: float = Field(0.5, ge=0, description="weight of LPIPS (AlexNet)")
    weight_scale: float = Field(0.02, ge=0, description="weight of the unit-variance term on latents, phase 1")
    weight_adversarial: float = Field(0.03, ge=0, description="weight of the adversarial term, phase 2")

    classes: int = Field(64, ge=1, le=256, description="k-means classes of the training patches")
    hidden: int = Field(192, ge=16, description="token width of the DiT")
    depth: int = Field(6, ge=1, description="blocks of the DiT")
    heads: int = Field(6, ge=1, description="attention heads of the DiT")
    prior_steps: int = Field(6_500, ge=1, description="steps of the DiT")
    prior_batch: int = Field(32, ge=1, description="patches a step")
    prior_learning_rate: float = Field(1e-3, gt=0, description="AdamW, warm-up, cosine")
    prior_warmup: int = Field(500, ge=1, description="warm-up steps")
    label_dropout: float = Field(0.15, ge=0, lt=1, description="share of samples shown with the null label")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="of the weights that are published")
    checkpoint_every: int = Field(1_000, ge=1, description="steps between checkpoints")
    seed: int = Field(0, ge=0, description="of everything drawn at random")
