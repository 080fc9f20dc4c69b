"""Official RRDBNet weights as ncnn files (``.bin``): RealSR and Real-ESRGAN are distributed in this format, too."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ddsr_core.sr.networks import build_network

#: Marks weights that are stored in half precision.
HALF = 0x01306B47
_ALIGNMENT = 4


def read_rrdbnet(data: bytes) -> dict[str, Tensor]:
    """State dict of the x4 RRDBNet (23 blocks, 64 channels) in an ncnn file.

    The file holds, for each convolution in the order of the network: a flag (uint32), the weights as float16 (OIHW, padded
    to 4 bytes), and the bias as float32.

    Raises:
        ValueError: another network, or another precision.
    """
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in build_network("rrdbnet").state_dict().items()}
    state: dict[str, Tensor] = {}
    at = 0
    for name, shape in shapes.items():
        if name.endswith(".weight"):
            if int.from_bytes(data[at : at + 4], "little") != HALF:
                raise ValueError(f"{name} is not stored in half precision, or the file is not of an x4 RRDBNet")
            at += 4
        kind = np.dtype("<f2" if name.endswith(".weight") else "<f4")
        count = int(np.prod(shape))
        values = np.frombuffer(data, kind, count, at) if at + count * kind.itemsize <= len(data) else None
        if values is None:
            raise ValueError(f"the file ends before {name}")
        state[name] = torch.from_numpy(values.astype(np.float32).reshape(shape))
        at += -(-count * kind.itemsize // _ALIGNMENT) * _ALIGNMENT
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes are left over: not the file of an x4 RRDBNet")
    return state
