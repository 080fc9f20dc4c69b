"""Safetensors files: the same content always gives the same bytes."""

from __future__ import annotations

import torch
from safetensors.torch import load

from ddsr_core.storage.safetensors_bytes import safetensors_bytes


def test_tensors_come_back_and_the_order_of_metadata_changes_nothing() -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor([1], dtype=torch.int64)}
    one = safetensors_bytes(tensors, {"x": "1", "y": "2", "format": "pt"})
    other = safetensors_bytes(tensors, {"format": "pt", "y": "2", "x": "1"})
    assert one == other
    back = load(one)
    assert torch.equal(back["a"], tensors["a"])
    assert torch.equal(back["b"], tensors["b"])
