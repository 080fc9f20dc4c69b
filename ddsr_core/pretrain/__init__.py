"""`ddsr pretrain`: trains a base model such as ddsr-tiny from a folder of photographs.

photos -> textured patches -> autoencoder -> decoder, adversarially -> k-means classes -> diffusion prior -> base folder.
Every phase stores its result in ``out/resume``, so that an interrupted run resumes from there.
"""

from ddsr_core.pretrain.config import PretrainConfig

__all__ = ["PretrainConfig"]
