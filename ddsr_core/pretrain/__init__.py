"""`ddsr pretrain`: trains the base model of the embedded default from a folder of photographs.

photos -> textured patches -> autoencoder -> decoder, adversarially -> k-means classes -> diffusion prior -> base folder.
Every phase leaves its result in ``out/resume``, so that a run that was cut off goes on where it stood.
"""

from ddsr_core.pretrain.config import PretrainConfig

__all__ = ["PretrainConfig"]
