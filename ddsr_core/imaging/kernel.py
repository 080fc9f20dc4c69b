"""Names of the bicubic kernels, importable without torch (configs need no more)."""

from typing import Literal

Kernel = Literal["matlab", "opencv"]
