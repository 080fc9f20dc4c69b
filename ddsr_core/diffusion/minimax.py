"""The minimax losses (paper, equations 3 and 4), as Minimax Diffusion (Gu et al., CVPR 2024) computes them.

Representativeness: raise the lowest cosine similarity between predicted latents and recent real latents of the class.
Diversity: lower the highest one between predicted latents and recent predictions of the class.

Which samples belong to which class is read from tensors on the CPU, so that nothing here waits for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Memory:
    """First in, first out store of flattened latents, one queue per pseudo-label.

    Attributes:
        size: entries per pseudo-label.
        queues: pseudo-label -> ``float32 (n, d)``, oldest first, on the device of the latents.
    """

    size: int
    queues: dict[int, Tensor] = field(default_factory=dict)

    def append(self, latents: Tensor, labels: Tensor, counted: Tensor | None = None) -> None:
        """Add a batch and drop the oldest entries beyond ``size``.

        Args:
            latents: ``(B, C, h, w)``.
            labels: pseudo-labels ``(B,)`` on the CPU.
            counted: ``bool (B,)`` on the CPU, which samples to add; None for all.
        """
        flat = latents.detach().float().flatten(1)
        counted = torch.ones_like(labels, dtype=torch.bool) if counted is None else counted
        for label in labels[counted].unique().tolist():
            new = flat[indices_of((labels == label) & counted, flat.device)]
            old = self.queues.get(label, new[:0])
            self.queues[label] = torch.cat([old, new])[-self.size :]

    def state_dict(self) -> dict[int, Tensor]:
        return dict(self.queues)

    def load_state_dict(self, state: dict[int, Tensor]) -> None:
        self.queues = {int(label): value for label, value in state.items()}


class Memories(NamedTuple):
    """Recent real latents (z_m in equation 3) and recent predictions (z_d in equation 4)."""

    real: Memory
    predicted: Memory

    @classmethod
    def of_size(cls, size: int) -> Memories:
        return cls(Memory(size), Memory(size))

    def state_dict(self) -> dict[str, Any]:
        return {"real": self.real.state_dict(), "predicted": self.predicted.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.real.load_state_dict(state["real"])
        self.predicted.load_state_dict(state["predicted"])


def indices_of(mask: Tensor, device: torch.device) -> Tensor:
    """Where ``mask (B,)``, on the CPU, is true: ``int64`` indices on ``device``, without waiting for it."""
    return torch.nonzero(mask).flatten().to(device, non_blocking=True)


def cosine_matrix(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarities ``(n, m)`` of the rows of ``(n, d)`` and ``(m, d)``."""
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def minimax_losses(
    predicted: Tensor, labels: Tensor, memories: Memories, counted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """L_r (equation 3) and L_d (equation 4) of a batch against the memories as they were before it.

    For each class in the batch there is one number over the whole matrix (samples of the class x memory): ``1 - min``
    against real latents, ``max`` against earlier predictions. So one pair per class receives a gradient. Both are averaged
    over the classes in the batch; a class with an empty memory contributes zero. Append the batch afterwards.

    Args:
        predicted: latents ``float (B, C, h, w)``, with gradient.
        labels: pseudo-labels ``(B,)`` on the CPU, whatever label the network was shown.
        counted: ``bool (B,)`` on the CPU, which samples take part; None for all, as released.

    Returns:
        ``(L_r, L_d)``, scalars.
    """
    flat = predicted.float().flatten(1)
    zero = flat.sum() * 0  # keeps the graph, so that a first step without memories is no special case
    representative, diverse = zero, zero
    present = labels.unique().tolist()
    for label in present:
        mask = labels == label if counted is None else (labels == label) & counted
        if not mask.any():
            continue
        of_class = flat[indices_of(mask, flat.device)]
        if label in memories.real.queues:
            representative = representative + 1 - cosine_matrix(of_class, memories.real.queues[label]).min()
        if label in memories.predicted.queues:
            diverse = diverse + cosine_matrix(of_class, memories.predicted.queues[label]).max()
    return representative / len(present), diverse / len(present)
