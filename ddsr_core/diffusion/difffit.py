"""DiffFit: fine-tune biases, scale vectors and the class table, and freeze the rest (Xie et al., ICCV 2023).

As in the authors' code, parameters are unfrozen whose name contains bias, norm, gamma or y_embed. An adapter holds only
what can have changed: of the class table, the rows of the pseudo-labels and the null row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ddsr_core.diffusion.config import ClassRowInit
from ddsr_core.diffusion.dit import DiT
from ddsr_core.errors import InputError
from ddsr_core.storage.files import write_atomically, write_json

UNFROZEN = ("bias", "norm", "gamma", "y_embed")
TABLE = "y_embedder.embedding_table.weight"
ROWS = "y_embedder.rows"


def unfreeze(model: DiT, gamma_blocks: int) -> dict[str, nn.Parameter]:
    """Add scales to the first ``gamma_blocks`` blocks, freeze all but DiffFit's parameters, return those by name."""
    model.enable_gammas(gamma_blocks)
    trainable = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_unfrozen(name))
        if parameter.requires_grad:
            trainable[name] = parameter
    return trainable


def _is_unfrozen(name: str) -> bool:
    return any(part in name for part in UNFROZEN)


def table_rows(label_map: Mapping[int, int], null_row: int) -> list[int]:
    """Rows of the class table that fine-tuning can change, in order of pseudo-label, the null row last.

    >>> table_rows({0: 0, 10: 3, 2: 5}, null_row=9)
    [0, 5, 3, 9]
    """
    return [label_map[label] for label in sorted(label_map)] + [null_row]


@torch.no_grad()
def initialize_rows(
    model: DiT, label_map: Mapping[int, int], init: ClassRowInit, nearest: Mapping[int, Mapping[int, float]] | None = None
) -> None:
    """Initialize the pseudo-labels' rows of the class table.

    Args:
        init: ``imagenet_rows`` leaves them unchanged; ``null`` copies the null row; ``clip_nearest`` and
            ``nearest_classes`` take a mean of the rows that ``nearest`` names for each pseudo-label; so does ``auto`` if
            ``nearest`` is given, and else copies the null row.
        nearest: pseudo-label -> row -> weight, of sum 1.

    Raises:
        InputError: ``clip_nearest`` or ``nearest_classes`` without the nearest classes of a pseudo-label.
    """
    table = model.y_embedder.embedding_table.weight
    if init == "imagenet_rows":
        return
    if init == "auto" and nearest is None:
        init = "null"
    before = table.clone()  # a row that is overwritten here may be averaged for another label
    for label, row in label_map.items():
        if init == "null":
            table[row] = before[model.config.null_row]
        elif not nearest or not nearest.get(label):
            raise InputError(
                f"no nearest classes for pseudo-label {label}",
                where="finetune.class_row_init",
                fix="give the class_rows artifact of these clusters, or set finetune.class_row_init=null",
            )
        else:
            weights = table.new_tensor(list(nearest[label].values()))
            table[row] = (weights[:, None] * before[list(nearest[label])]).sum(0)


@dataclass(frozen=True)
class Adapter:
    """What fine-tuning changed.

    Attributes:
        tensors: biases and gammas by name, and ``y_embedder.rows (k + 1, D)``.
        label_map: pseudo-label -> row of the class table.
        base_digest: of the base model that it belongs to.
        gamma_blocks: number of blocks with scales.
    """

    tensors: dict[str, Tensor]
    label_map: dict[int, int]
    base_digest: str
    gamma_blocks: int

    def apply(self, model: DiT, base_digest: str) -> None:
        """Apply the adapter to its base model, in place.

        Raises:
            InputError: it belongs to another base model, or its tensors do not fit.
        """
        if base_digest != self.base_digest:
            raise InputError(
                f"the adapter belongs to another base model ({self.base_digest[:12]}, not {base_digest[:12]})",
                fix="load the base that it was fine-tuned from, or fine-tune again",
            )
        model.enable_gammas(self.gamma_blocks)
        own = dict(model.named_parameters())
        rows = table_rows(self.label_map, model.config.null_row)
        expected = {name: p.shape for name, p in own.items() if name != TABLE and _is_unfrozen(name)}
        expected[ROWS] = own[TABLE][rows].shape
        shapes = {name: value.shape for name, value in self.tensors.items()}
        if shapes != expected:
            wrong = sorted(name for name in shapes | expected if shapes.get(name) != expected.get(name))
            raise InputError(
                f"the adapter's tensors do not fit the base model: {', '.join(wrong[:4])}",
                fix="fine-tune again",
            )
        with torch.no_grad():
            own[TABLE][rows] = self.tensors[ROWS].to(own[TABLE])
            for name, value in self.tensors.items():
                if name != ROWS:
                    own[name].copy_(value)


def extract(trainable: Mapping[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    """The adapter's tensors, on the CPU, from DiffFit's parameters (or their averages)."""
    tensors = {name: value.detach().cpu().clone() for name, value in trainable.items() if name != TABLE}
    tensors[ROWS] = trainable[TABLE].detach()[rows].cpu().clone()
    return dict(sorted(tensors.items()))


def save_adapter(folder: Path, raw: Adapter, ema: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write ``adapter.safetensors``, ``adapter_ema.safetensors`` and ``adapter.json``."""
    write_atomically(folder / "adapter.safetensors", save(raw.tensors))
    write_atomically(folder / "adapter_ema.safetensors", save(dict(ema)))
    description = {
        "format": 1,
        "base_digest": raw.base_digest,
        "gamma_blocks": raw.gamma_blocks,
        "label_map": [[label, row] for label, row in sorted(raw.label_map.items())],
        **facts,
    }
    write_json(folder / "adapter.json", description)


def load_adapter(folder: Path, weights: str = "ema") -> Adapter:
    """Read an adapter; ``weights`` is ``ema`` or ``raw``.

    Raises:
        InputError: ``folder`` holds no adapter, or a damaged one.
    """
    path = folder / ("adapter_ema.safetensors" if weights == "ema" else "adapter.safetensors")
    if not path.is_file() or not (folder / "adapter.json").is_file():
        raise InputError("no adapter here", where=folder, fix="name the folder of a finished `finetune` stage")
    try:
        facts = json.loads((folder / "adapter.json").read_text())
        label_map = {int(label): int(row) for label, row in facts["label_map"]}
        return Adapter(load_file(path), label_map, facts["base_digest"], facts["gamma_blocks"])
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"the adapter is damaged: {error}", where=folder, fix="fine-tune again") from error


@torch.no_grad()
def fold(model: DiT) -> None:
    """Multiply every DiffFit scale into the linear layer before it and remove it: a plain DiT with equal outputs."""
    for block in model.layers:
        attn, mlp = block.attn, block.mlp
        if attn.gamma_qkv is None or attn.gamma_proj is None or block.gamma_attn is None or block.gamma_mlp is None:
            continue
        # The block's scale acts after the gate, which is elementwise too, so the two commute.
        for linear, gamma in (
            (attn.qkv, attn.gamma_qkv),
            (attn.proj, attn.gamma_proj * block.gamma_attn),
            (mlp.fc2, block.gamma_mlp),
        ):
            linear.weight.mul_(gamma[:, None])
            linear.bias.mul_(gamma)
        attn.gamma_qkv = attn.gamma_proj = block.gamma_attn = block.gamma_mlp = None
