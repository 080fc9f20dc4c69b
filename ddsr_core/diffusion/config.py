"""Configs of the stages of section II-B: latents, class rows, fine-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ddsr_core.config import StageConfig
from ddsr_core.imaging.kernel import SCALE, Scale
from ddsr_core.pseudo_labels.config import EmbeddingsConfig

#: The last step whose signal-to-noise ratio is at least one (alpha_bar >= 1/2).
LAST_STEP_OF_SIGNAL = 258
ClassRowInit = Literal["auto", "nearest_classes", "null", "imagenet_rows", "clip_nearest"]
LsrMode = Literal["off", "pixels", "target"]
X0Hat = Literal["x0", "difference"]
Checkpointing = Literal["auto", "on", "decoder", "off"]


class LatentsConfig(StageConfig):
    """How patches are encoded. Always in float32: the moments are stored in float16, and training adds noise to them."""

    keyed_if_set: ClassVar[frozenset[str]] = frozenset({"scale"})

    batch_size: int = Field(
        16, ge=1, le=1024, description="Patches per forward pass of the encoder. Lower it if memory runs out."
    )
    scale: Scale = Field(SCALE, description="Upsampling factor of the recorded PSNR_bic. Filled in by the pipeline.")


class ClassRowsConfig(StageConfig):
    """How the classes of the base model that are nearest to a cluster are found."""

    by: Literal["names", "centers"] = Field(
        "names",
        description="What a cluster is compared with: names of classes, in CLIP's space, or centers of classes, in VGG16's. "
        "Filled in by the pipeline from finetune.class_row_init.",
    )
    nearest: int = Field(8, ge=1, le=1000, description="Classes whose rows are averaged to initialize one pseudo-label.")
    patches_per_cluster: int = Field(
        200, ge=1, description="Patches of each cluster that are compared with class centers, at most (by=centers)."
    )
    prompt: str = Field(
        "a photo of a {}.", pattern=r"\{\}", description="Text that a class name is inserted into (by=names)."
    )
    embeddings: EmbeddingsConfig = Field(
        EmbeddingsConfig(), description="Feature network of the clusters (by=names). Filled in by the pipeline."
    )


class FinetuneConfig(StageConfig):
    """Length of fine-tuning, DiffFit, and the weights of the loss terms (paper, equation 6)."""

    keyed_if_set: ClassVar[frozenset[str]] = frozenset({"scale"})

    steps: int | None = Field(
        None, ge=0, description="Optimizer steps; 0 keeps the base model unchanged. Set either this or epochs."
    )
    epochs: int | None = Field(70, ge=1, description="Passes over all patches. Set either this or steps.")
    batch_size: int = Field(8, ge=1, le=4096, description="Patches per step.")
    accumulate: int = Field(
        1,
        ge=1,
        description="Parts that a batch is split into and computed one after another. Raise it if memory runs out; the "
        "minimax terms are then computed per part.",
    )
    processes: int = Field(1, ge=1, le=64, description="Processes that share every batch, one per GPU.")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="Learning rate of AdamW: constant, without weight decay.")
    gamma_blocks: int = Field(
        14, ge=0, description="Number of transformer blocks, from the first, that get DiffFit scales. 14 of 28 as released."
    )
    class_row_init: ClassRowInit = Field(
        "auto",
        description="Initial rows of the class table for the pseudo-labels: nearest_classes averages the rows of the "
        "classes whose centers are nearest to the cluster's patches, for base models made by ddsr pretrain; null copies the "
        "unconditional row; imagenet_rows keeps rows 0 to k-1 (as released); clip_nearest averages the rows of the classes "
        "whose names are nearest to the cluster in CLIP's space (open_clip embeddings only). auto is nearest_classes if "
        "the base model has class centers, else null.",
    )
    lambda_r: float = Field(0.002, ge=0, description="Weight of the representativeness loss L_r (equation 3).")
    lambda_d: float = Field(0.008, ge=0, description="Weight of the diversity loss L_d (equation 4).")
    memory_size: int = Field(64, ge=1, description="Latents per pseudo-label in each of the two minimax memories.")
    minimax_last_step: int = Field(
        LAST_STEP_OF_SIGNAL,
        ge=0,
        le=999,
        description="Last diffusion step t at which the minimax losses and their memories use a prediction. 258 is the last "
        "with a signal-to-noise ratio of at least one; 999, as released, uses all.",
    )
    x0_hat: X0Hat = Field(
        "x0",
        description="Prediction compared in the minimax losses: x0 is the predicted clean latent (as released), difference "
        "is z_t - eps (as the paper prints it).",
    )
    lsr_mode: LsrMode = Field(
        "target",
        description="Form of L_SR: off (the released term has no gradient), pixels (equation 5: minus the pixel error of "
        "the bicubic round trip), or target (PSNR_bic must not exceed that of the real patch).",
    )
    scale: Scale = Field(SCALE, description="Upsampling factor of L_SR. Filled in by the pipeline.")
    lambda_sr: float = Field(1.0, ge=0, description="Weight of L_SR.")
    lsr_reference: Literal["patch", "decoded"] = Field(
        "decoded",
        description="PSNR_bic that lsr_mode=target compares with: that of the patch itself, or of its latent after "
        "decoding, which the decoder can reach.",
    )
    lsr_crop_px: int | None = Field(
        None,
        ge=8,
        description="Side of the random window that L_SR decodes, in latent pixels; null decodes all. Set it to 32 or less "
        "if L_SR decodes with the full VAE and memory runs out.",
    )
    lsr_last_step: int = Field(
        LAST_STEP_OF_SIGNAL,
        ge=0,
        le=999,
        description="Last diffusion step t at which lsr_mode=target applies. Above 258 a prediction is mostly noise.",
    )
    lsr_adapt_every: int | None = Field(
        500,
        ge=1,
        description="Steps between checks of the texture of samples, which scale the weight of lsr_mode=target: full while "
        "samples are 1 dB smoother than the patches, zero once they are as textured. null keeps lambda_sr constant.",
    )
    lsr_margin_db: float = Field(
        0.0, ge=0, description="How much smoother than the real patch a prediction may be without loss, in dB (target)."
    )
    vb_weight: float = Field(1.0, ge=0, description="Weight of the variational bound that trains the variance.")
    label_dropout: float = Field(
        0.1, ge=0, lt=1, description="Share of samples trained without their label; classifier-free guidance needs some."
    )
    flip: bool = Field(True, description="Mirror half of the patches. Turn it off if left and right must not be exchanged.")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="Decay of the averaged adapter. Lower it for short runs.")
    ema_warmup: bool = Field(True, description="Use min(ema_decay, (1 + n) / (10 + n)) at step n, which forgets the base.")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="Precision of the networks. Noising and losses are always computed in float32."
    )
    checkpointing: Checkpointing = Field(
        "auto",
        description="What to recompute in the backward pass to save memory: decoder makes L_SR decode one image at a time, "
        "on also recomputes transformer blocks, off nothing. auto takes the first of off, decoder, on that fits the GPU.",
    )
    compile: bool = Field(
        False, description="Compile the network with torch.compile. Worth it for thousands of steps on a GPU."
    )
    norm_every: int = Field(50, ge=1, description="Steps between measurements of the gradient norm of each loss term.")
    checkpoint_every: int = Field(500, ge=1, description="Steps between checkpoints that an interrupted run resumes from.")
    sample_every: int | None = Field(
        1_000,
        ge=1,
        description="Steps between sample sheets; one is also made before the first and after the last step. null: none.",
    )
    seed: int = Field(0, ge=0, description="Seed of batches, noise and label dropout.")

    @field_validator("class_row_init", mode="before")
    @classmethod
    def _null_is_a_name(cls, value: object) -> object:
        return "null" if value is None else value  # ``--set finetune.class_row_init=null`` may arrive as no value

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set either steps or epochs, and the other to null")
        if self.batch_size % (self.accumulate * self.processes):
            raise ValueError("batch_size must be a multiple of accumulate x processes")
        if self.lsr_crop_px is not None and self.lsr_mode == "target" and self.lsr_reference == "patch":
            raise ValueError("a crop has no PSNR_bic of its patch: set lsr_reference to decoded")
        return self

    def total_steps(self, patches: int) -> int:
        """Optimizer steps of a run on this number of patches."""
        return self.steps if self.steps is not None else -(-(self.epochs or 0) * patches // self.batch_size)

    @property
    def adapts_lsr(self) -> bool:
        """Whether the weight of L_SR follows from the texture of samples (see `lsr_adapt_every`)."""
        return self.lsr_adapt_every is not None and self.lsr_mode == "target" and self.lambda_sr > 0
