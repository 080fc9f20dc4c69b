"""The two layouts in which DiT weights are published: the original release's and diffusers'.

Names on the left are the original's (and ours). diffusers has a copy of both embedders in every block, splits qkv into
three and does not store the position table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ddsr_core.errors import InputError

_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_BLOCK = {
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
_EMBEDDERS = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}


def to_diffusers(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Original layout to diffusers'. DiffFit's scales must have been folded before.

    Raises:
        InputError: the state has DiffFit gammas.
    """
    if any("gamma" in name for name in state):
        raise InputError("diffusers' DiT has no DiffFit scales", fix="fold them into the weights first")
    result: dict[str, Tensor] = {}
    for ours, theirs in _pairs(depth):
        shared = len(theirs) > 1 or ours in _EMBEDDERS  # safetensors refuses tensors that share memory
        for name, part in zip(theirs, state[ours].chunk(len(theirs)), strict=True):
            result[name] = part.clone() if shared else part
    return result


def from_diffusers(state: Mapping[str, Tensor], position: Tensor) -> dict[str, Tensor]:
    """diffusers' layout to the original's; ``position`` is the table that diffusers does not store.

    Raises:
        InputError: the blocks' copies of an embedder differ.
    """
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    result: dict[str, Tensor] = {"pos_embed": position}
    for ours, theirs in _pairs(depth):
        value = state[theirs[0]] if len(theirs) == 1 else torch.cat([state[name] for name in theirs])
        if ours in result and not torch.equal(result[ours], value):
            raise InputError("the blocks have different copies of an embedder", where=theirs[0])
        result[ours] = value
    return result


def _pairs(depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name of every tensor in our layout, and its names in diffusers': three for qkv; embedders once per block."""
    for kind in ("weight", "bias"):
        for ours, theirs in _OUTER.items():
            yield f"{ours}.{kind}", (f"{theirs}.{kind}",)
    for index in range(depth):
        block, twin = f"blocks.{index}", f"transformer_blocks.{index}"
        for kind in ("weight", "bias"):
            for ours, parts in _BLOCK.items():
                yield f"{block}.{ours}.{kind}", tuple(f"{twin}.{part}.{kind}" for part in parts)
        for name, copy in _EMBEDDERS.items():
            yield name, (f"{twin}.norm1.emb.{copy}",)
