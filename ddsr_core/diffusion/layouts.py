"""The two layouts in which DiT weights are published: the original release's and diffusers'.

Names on the left are the original's (and ours). diffusers keeps a copy of both embedders in every block, splits qkv in
three and does not store the position table.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ddsr_core.errors import InputError

_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_EMBEDDERS = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}


def is_diffusers_layout(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has diffusers' names."""
    return "proj_out_1.weight" in state


def to_diffusers(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Original layout to diffusers'. Gammas must have been folded before.

    Raises:
        InputError: the state has DiffFit gammas.
    """
    if any("gamma" in name for name in state):
        raise InputError("DiffFit scales have no place in diffusers' DiT", mend="fold them into the weights first")
    result: dict[str, Tensor] = {}
    for ours, theirs in _OUTER.items():
        for kind in ("weight", "bias"):
            result[f"{theirs}.{kind}"] = state[f"{ours}.{kind}"]
    for index in range(depth):
        block, twin = f"blocks.{index}", f"transformer_blocks.{index}"
        for ours, theirs in _BLOCK.items():
            for kind in ("weight", "bias"):
                result[f"{twin}.{theirs}.{kind}"] = state[f"{block}.{ours}.{kind}"]
        for kind in ("weight", "bias"):
            parts = state[f"{block}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("to_q", "to_k", "to_v"), parts, strict=True):
                result[f"{twin}.attn1.{name}.{kind}"] = part.clone()
        for ours, theirs in _EMBEDDERS.items():
            result[f"{twin}.norm1.emb.{theirs}"] = state[ours].clone()
    return result


def from_diffusers(state: Mapping[str, Tensor], position: Tensor) -> dict[str, Tensor]:
    """diffusers' layout to the original's; ``position`` is the table that diffusers does not store.

    Raises:
        InputError: the blocks' copies of an embedder differ, so that there is no single embedder to take.
    """
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    result: dict[str, Tensor] = {"pos_embed": position}
    for ours, theirs in _OUTER.items():
        for kind in ("weight", "bias"):
            result[f"{ours}.{kind}"] = state[f"{theirs}.{kind}"]
    for index in range(depth):
        block, twin = f"blocks.{index}", f"transformer_blocks.{index}"
        for ours, theirs in _BLOCK.items():
            for kind in ("weight", "bias"):
                result[f"{block}.{ours}.{kind}"] = state[f"{twin}.{theirs}.{kind}"]
        for kind in ("weight", "bias"):
            parts = [state[f"{twin}.attn1.{name}.{kind}"] for name in ("to_q", "to_k", "to_v")]
            result[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)
        for ours, theirs in _EMBEDDERS.items():
            copy = state[f"{twin}.norm1.emb.{theirs}"]
            if ours in result and not torch.equal(result[ours], copy):
                raise InputError("the blocks have different copies of an embedder", where=f"{twin}.norm1.emb.{theirs}")
            result[ours] = copy
    return result
