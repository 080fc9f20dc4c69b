"""Names of the bicubic kernels. Importable without torch, as configs need them."""

from typing import Literal

Kernel = Literal["matlab", "opencv"]
