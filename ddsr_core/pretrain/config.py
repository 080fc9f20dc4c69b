"""Config of `ddsr pretrain`: the defaults are the recipe of the next `ddsr-tiny`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ddsr_core.config import StageConfig

#: Fields that decide what each phase computes, beside those of the phases before it.
PHASE_FIELDS: dict[str, tuple[str, ...]] = {
    "patches": (
        "image_px", "stride_px", "keep_share", "largest_short_side_px", "smallest_short_side_px", "scale_step", "scales",
        "least_reduction", "most_per_photo", "most_patches", "held_out_share", "held_out_patches", "seed",
    ),
    "autoencoder": (
        "vae_channels", "vae_steps", "vae_batch", "vae_learning_rate", "latent_noise", "weight_edge", "weight_lpips",
        "weight_scale", "vae_checkpoint_every",
    ),
    "decoder": ("decoder_steps", "weight_adversarial"),
    "features": ("classes", "token_dims"),
    "prior": (
        "hidden", "depth", "heads", "row_std", "prior_steps", "prior_batch", "prior_learning_rate", "prior_warmup",
        "decay_share", "label_dropout", "timestep_weighting", "repa_weight", "repa_block", "ema_decay", "compile",
        "checkpoint_every",
    ),
}  # fmt: skip


class PretrainConfig(StageConfig):
    """How a base model like `ddsr-tiny` is trained: patches, autoencoder, decoder, classes, diffusion prior."""

    image_px: int = Field(
        64, ge=16, multiple_of=8, description="Height and width of the images the model will make, in pixels."
    )
    stride_px: int = Field(
        16,
        ge=4,
        multiple_of=4,
        description="Distance of neighboring training windows, in pixels. Lower it for more windows.",
    )
    keep_share: float = Field(
        0.75, gt=0, le=1,
        description="Share of all windows to keep, lowest PSNR_bic (most texture) first. With photo textures among the "
        "photos 0.75 gives the threshold that the median has on ordinary photos; use 0.5 for ordinary photos.",
    )  # fmt: skip
    largest_short_side_px: int = Field(
        1200, ge=64, description="Short side of the largest copy of a photo, in pixels. Lower it to save time."
    )
    smallest_short_side_px: int = Field(
        128, ge=16, description="Copies with a smaller short side than this are not used, in pixels."
    )
    scales: int = Field(4, ge=1, le=12, description="Number of copies per photo, each smaller than the one before.")
    scale_step: float = Field(0.7, gt=0, lt=1, description="Size of each copy of a photo relative to the one before.")
    least_reduction: float = Field(
        1.9, ge=1, description="Smallest reduction of a photo. It hides compression marks; lower it for clean photos."
    )
    most_per_photo: int = Field(
        400, ge=1, description="Windows per photo, at most, sampled at random. Raise it if there are few photos."
    )
    most_patches: int = Field(
        48_000, ge=8, description="Training patches, at most, sampled at random. Raise it if memory allows."
    )
    held_out_share: float = Field(0.1, gt=0, lt=1, description="Share of the photos that are held out to measure scores on.")
    held_out_patches: int = Field(2_048, ge=4, description="Patches of held-out photos to measure with, at most.")

    vae_channels: int = Field(32, ge=8, description="Width of the autoencoder. Raise it for sharper reconstructions.")
    vae_steps: int = Field(4_000, ge=1, description="Training steps of the autoencoder (encoder and decoder together).")
    decoder_steps: int = Field(
        0, ge=0, description="Further steps of the decoder alone, with the adversarial term. 0 skips this phase."
    )
    vae_batch: int = Field(16, ge=1, description="Patches per step of the autoencoder.")
    vae_learning_rate: float = Field(
        2e-3,
        gt=0,
        description="Adam's learning rate for the autoencoder (cosine). The decoder phase starts at a quarter of it.",
    )
    latent_noise: float = Field(
        0.05, ge=0,
        description="Standard deviation of the noise on the latents while the autoencoder trains. "
        "Raise it for a decoder that is more forgiving, lower it for a more exact one.",
    )  # fmt: skip
    weight_edge: float = Field(1.0, ge=0, description="Weight of the edge term (L1 of finite differences).")
    weight_lpips: float = Field(0.5, ge=0, description="Weight of LPIPS (AlexNet).")
    weight_scale: float = Field(
        0.02, ge=0, description="Weight of the term that gives the latents zero mean and unit variance."
    )
    weight_adversarial: float = Field(0.03, ge=0, description="Weight of the adversarial term of the decoder phase.")
    vae_checkpoint_every: int = Field(
        500, ge=1, description="Steps between checkpoints of the autoencoder and decoder phases."
    )

    classes: int = Field(
        64,
        ge=1,
        le=256,
        description="Classes of the training patches (k-means on VGG16 features). More classes are sharper.",
    )
    token_dims: int = Field(
        64, ge=1, le=512,
        description="Principal components of the VGG16 token maps that the prior is aligned with, if repa_weight > 0.",
    )  # fmt: skip
    hidden: int = Field(256, ge=16, description="Token width of the DiT.")
    depth: int = Field(4, ge=1, description="Blocks of the DiT.")
    heads: int = Field(4, ge=1, description="Attention heads of the DiT; they must divide the width.")
    row_std: float = Field(
        0.5,
        gt=0,
        description="Standard deviation of the class rows at the start. Larger values set the classes apart sooner.",
    )
    prior_steps: int = Field(31_250, ge=1, description="Training steps of the DiT. Samples seen = steps x batch.")
    prior_batch: int = Field(64, ge=1, description="Patches per step of the DiT.")
    prior_learning_rate: float = Field(
        1e-3, gt=0, description="AdamW's learning rate for the DiT: warm-up, constant, then down to zero."
    )
    prior_warmup: int = Field(200, ge=1, description="Steps over which the learning rate rises from zero.")
    decay_share: float = Field(
        0.2, gt=0, le=1, description="Share of the steps, at the end, over which the learning rate falls linearly to zero."
    )
    label_dropout: float = Field(
        0.1, ge=0, lt=1, description="Share of samples trained with the null label, for guidance and unlabeled sampling."
    )
    compile: bool = Field(
        False,
        description="Compile the DiT with torch.compile. Requires a C++ compiler; a quarter faster on two cores at the "
        "default size. Results differ by rounding.",
    )
    timestep_weighting: Literal["uniform", "min_snr", "logit_normal"] = Field(
        "uniform",
        description="Emphasis among timesteps: all alike; loss weights min(SNR, 5) / SNR; or t sampled from a logit-normal "
        "distribution, which favors the middle.",
    )
    repa_weight: float = Field(
        0.5, ge=0, description="Weight of the alignment of the DiT's tokens with VGG16 features (REPA). 0 switches it off."
    )
    repa_block: int = Field(2, ge=1, description="Block of the DiT, counted from 1, whose output is aligned.")
    ema_decay: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="Decay of the averaged weights, which are the ones published. Raise it for longer runs.",
    )
    checkpoint_every: int = Field(
        500, ge=1,
        description="Steps between checkpoints of the prior. AdamW's moments are rounded to bfloat16 at each, so that a "
        "checkpoint stays small and a continued run gives the same bytes; hence it is part of the recipe.",
    )  # fmt: skip
    score_every: int = Field(
        2_000, ge=1, description="Steps between scores on held-out patches, each with a sample sheet. Lower it to see more."
    )
    score_samples: int = Field(512, ge=4, description="Images sampled for a score. Raise it for less noisy scores.")
    score_sampler_steps: int = Field(20, ge=1, description="Network evaluations per image sampled for a score.")
    seed: int = Field(0, ge=0, description="Seed of all random numbers.")

    @model_validator(mode="after")
    def _fits(self) -> PretrainConfig:
        if self.hidden % self.heads:
            raise ValueError(f"hidden ({self.hidden}) must be a multiple of heads ({self.heads})")
        if self.repa_weight and self.repa_block > self.depth:
            raise ValueError(f"repa_block ({self.repa_block}) must be at most depth ({self.depth})")
        return self
