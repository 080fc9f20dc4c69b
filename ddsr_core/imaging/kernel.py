"""Names of the bicubic kernels. Importable without torch, as configs need them."""

from typing import Literal

Kernel = Literal["matlab", "opencv"]
#: Upsampling factors of the pipeline, and that of the paper.
Scale = Literal[2, 3, 4]
SCALE: Scale = 4
