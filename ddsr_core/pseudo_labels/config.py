"""Configs of the stages patches, embeddings and clusters."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from ddsr_core.config import StageConfig
from ddsr_core.imaging.kernel import SCALE, Kernel, Scale
from ddsr_core.pseudo_labels.names import EmbedderName


class PatchesConfig(StageConfig):
    """Which windows of the photos become training patches. Set either ``threshold_db`` or ``quantile``."""

    keyed_if_set: ClassVar[frozenset[str]] = frozenset({"scale"})

    patch_px: int = Field(
        512,
        ge=16,
        le=4096,
        multiple_of=4,
        description="Height and width of a patch in pixels. Photos that are smaller on a side are skipped.",
    )
    stride_px: int = Field(
        256,
        ge=4,
        multiple_of=4,
        description="Distance between neighboring windows in pixels. Lower it for more patches that overlap more.",
    )
    flush_right: bool = Field(
        False, description="Add a last row and column of windows that touch the bottom and right edges of the photo."
    )
    kernel: Kernel = Field(
        "matlab",
        description="Bicubic kernel of PSNR_bic: matlab is antialiased, opencv is that of the authors' released code and "
        "gives values that are 1.0 to 1.8 dB lower.",
    )
    scale: Scale = Field(SCALE, description="Upsampling factor of PSNR_bic. Filled in by the pipeline.")
    threshold_db: float | None = Field(
        None,
        description="Keep windows with a PSNR_bic below this value in dB. Lower it for fewer patches with more texture.",
    )
    quantile: float | None = Field(
        0.5,
        gt=0,
        le=1,
        description="Keep this share of the windows, those with the lowest PSNR_bic. Unlike threshold_db, it adapts to the "
        "photos.",
    )

    @model_validator(mode="after")
    def _one_rule(self) -> PatchesConfig:
        if (self.threshold_db is None) == (self.quantile is None):
            raise ValueError("set exactly one of threshold_db and quantile (the other to null)")
        return self


class EmbeddingsConfig(StageConfig):
    """Which network turns a patch into a feature vector."""

    backend: EmbedderName = Field(
        "open_clip",
        description="Feature network: open_clip is the paper's choice and allows search by words; vgg16 needs no download.",
    )
    model: str = Field("ViT-B-32", description="Architecture, by its name in open_clip (open_clip only).")
    weights: str = Field(
        "openai",
        description="Tag of open_clip or path of a weights file (open_clip only). A file whose weights were trained with "
        "QuickGELU, such as those of the tag openai, needs a model named …-quickgelu.",
    )
    image_px: int = Field(
        224,
        ge=32,
        le=1024,
        description="Patches are scaled to this height and width in pixels (vgg16 only). The network was trained on 224; "
        "lower it to save time.",
    )
    normalize: bool = Field(
        True, description="Scale every vector to length 1, so that k-means compares directions (k-means on the sphere)."
    )
    batch_size: int = Field(32, ge=1, le=4096, description="Patches per forward pass. Lower it if memory runs out.")


class ClustersConfig(StageConfig):
    """How patches are grouped into pseudo-classes."""

    k: int = Field(
        7,
        ge=2,
        le=1000,
        description="Number of pseudo-labels. Raise it for photos of many different subjects.",
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of the k-means initialization.")
    n_init: int = Field(10, ge=1, le=100, description="Restarts of k-means; the best one is used.")
    max_iterations: int = Field(300, ge=1, le=10_000, description="Iterations per restart, at most.")
    spherical: bool = Field(
        False,
        description="Scale vectors to length 1 before clustering. Has no effect if embeddings.normalize is set.",
    )
