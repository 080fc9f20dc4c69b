"""Safetensors files whose bytes depend on nothing but their content."""

from __future__ import annotations

import json
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file, with the metadata in alphabetical order.

    ``safetensors.torch.save`` writes metadata in the order of a hash table, which differs from process to process.

    Args:
        tensors: moved to the CPU and made contiguous.
        metadata: of the whole file.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(contiguous, metadata=dict(metadata))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format's padding, which keeps the tensors aligned
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
