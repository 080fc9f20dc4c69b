"""Config of the sampling stage (paper, section II-C)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ddsr_core.config import StageConfig
from ddsr_core.diffusion.names import SamplerName
from ddsr_core.imaging.kernel import SCALE, Scale

#: PNG files of the selected images as they were sampled, if detail was restored in those of the set. An archive, because
#: every image file in the folder would count as one of the set.
SAMPLED = "sampled.zip"
Timestep = Annotated[float, Field(ge=0, le=999)]
Allocation = Literal["equal", "proportional"]
InitPatches = Literal["medoids", "k-center"]
Select = Literal["none", "psnr_bic", "psnr_bic_and_coverage"]


class SampleConfig(StageConfig):
    """How many images are sampled, how they are selected, and whether their detail is restored."""

    keyed_if_set: ClassVar[frozenset[str]] = frozenset({"scale", "own_cluster"})

    # Sampling
    count: int = Field(70, ge=1, le=100_000, description="Images in the distilled set.")
    allocation: Allocation = Field(
        "equal", description="Images per pseudo-label: the same number, or in proportion to the patches of its cluster."
    )
    sampler: SamplerName = Field(
        "dpmpp", description="Solver: ancestral (as released), DPM-Solver++ 2M, or UniPC, which needs the fewest steps."
    )
    steps: int = Field(25, ge=2, le=1000, description="Sampling steps. Raise it to 50 or more for the ancestral sampler.")
    guidance_scale: float = Field(
        1.0, ge=0, le=20, description="Classifier-free guidance; 1 is none. Higher values smooth texture. 4 as released."
    )
    guided_channels: Literal[3, 4] = Field(3, description="Latent channels that guidance acts on; 3 as released.")
    guidance_interval: tuple[Timestep, Timestep] = Field(
        (0, 999),
        description="Lowest and highest t at which guidance is applied (0 is clean). Outside, a step costs half as much.",
    )
    strength: float = Field(
        1.0,
        gt=0,
        le=1,
        description="1 starts from pure noise. Below 1, sampling starts from real patches noised to t = 1000 * strength. "
        "Lower it to stay closer to the data, at the risk of near-copies.",
    )
    init: InitPatches = Field(
        "medoids",
        description="Real patches that sampling starts from if strength is below 1: those nearest to the cluster's "
        "centroid, or patches that are spread over the cluster (k-center).",
    )
    weights: Literal["ema", "raw"] = Field(
        "ema", description="Adapter weights. ema: the running average; raw: those of the last step."
    )
    batch_size: int = Field(16, ge=1, le=4096, description="Images per forward pass. Lower it if memory runs out.")
    decode_tile_px: int | None = Field(
        None,
        ge=32,
        description="Decode in tiles of this side, in pixels: less memory, approximate pixels. null decodes whole images.",
    )
    precision: Literal["bf16", "fp32"] = Field(
        "fp32", description="Precision of the networks. The solver always works in float32."
    )
    seed: int = Field(0, ge=0, description="Seed of the noise.")

    # Selection
    oversample: int = Field(4, ge=1, le=64, description="Candidates sampled per selected image. 1 keeps all samples.")
    select: Select = Field(
        "psnr_bic_and_coverage",
        description="How images are selected from the candidates: none takes the first, psnr_bic matches the PSNR_bic "
        "distribution of the real patches, psnr_bic_and_coverage also covers them in embedding space.",
    )
    own_cluster: bool = Field(
        False,
        description="Select first among the candidates whose nearest patch in embedding space has their pseudo-label. Turn "
        "it on if images of a cluster look like patches of another.",
    )
    scale: Scale = Field(SCALE, description="Upsampling factor of PSNR_bic. Filled in by the pipeline.")
    max_cosine: float = Field(
        0.98,
        gt=0,
        le=1,
        description="Candidates whose thumbnail has a higher cosine similarity than this to a training patch are rejected "
        "as copies. 1 turns the check off.",
    )
    max_embedding_cosine: float = Field(
        1.0,
        gt=0,
        le=1,
        description="The same limit in embedding space; 1 turns it off. The usual similarity depends on the feature "
        "network: different real 64-px patches reach 0.95 in VGG16's space.",
    )
    sr_gain_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the candidates with the highest SR gain, out of which images are selected. The gain is "
        "measured by the teacher network. 1 turns this off.",
    )

    # Detail restoration
    detail_restoration: float = Field(
        0.0,
        ge=0,
        le=1,
        description="How much of the detail of the selected images to replace with the teacher network's reconstruction "
        "from their LR images: 0 = none (as in the paper), 1 = all.",
    )

    @model_validator(mode="after")
    def _interval_rises(self) -> SampleConfig:
        if self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError("guidance_interval must be (lowest t, highest t)")
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether an SR network trained on the accepted patches takes part."""
        return self.sr_gain_share < 1 or self.detail_restoration > 0
