"""The minimax losses (paper, equations 3 and 4), as Minimax Diffusion (Gu et al., CVPR 2024) computes them.

Representativeness: raise the lowest cosine similarity between predicted x0 and recent real latents of the class.
Diversity: lower the highest one between predicted x0 and recent predictions of the class.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Memory:
    """First in, first out store of flattened latents, one queue a pseudo-label.

    Attributes:
        size: entries a pseudo-label.
        queues: pseudo-label -> ``float32 (n, d)``, oldest first.
    """

    size: int
    queues: dict[int, Tensor] = field(default_factory=dict)

    def append(self, latents: Tensor, labels: Tensor) -> None:
        """Add a batch ``(B, C, h, w)`` under its pseudo-labels ``(B,)``; the oldest beyond ``size`` go."""
        flat = latents.detach().float().flatten(1)
        for label in labels.unique().tolist():
            new = flat[labels == label]
            old = self.queues.get(label, new[:0])
            self.queues[label] = torch.cat([old, new])[-self.size :]

    def state_dict(self) -> dict[int, Tensor]:
        return dict(self.queues)

    def load_state_dict(self, state: dict[int, Tensor]) -> None:
        self.queues = {int(label): value for label, value in state.items()}


def cosine_matrix(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarities ``(n, m)`` of the rows of ``(n, d)`` and ``(m, d)``."""
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def minimax_losses(
    x0_hat: Tensor, labels: Tensor, real: Memory, pseudo: Memory, counted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """L_r and L_d of a batch against the memories as they were before it. Append the batch afterwards.

    For each class in the batch one number over the whole (batch in class x memory) matrix: ``1 - min`` against real
    latents, ``max`` against earlier predictions; so one pair a class receives gradient. Both are averaged over the
    classes in the batch; a class with an empty memory adds nothing.

    Args:
        x0_hat: ``float (B, C, h, w)``, with gradient.
        labels: pseudo-labels ``(B,)``, whatever the label the network was shown.
        real, pseudo: memories of real latents and of earlier predictions.
        counted: which samples take part ``bool (B,)``; None for all, as released.

    Returns:
        ``(L_r, L_d)``, scalars.
    """
    flat = x0_hat.float().flatten(1)
    zero = flat.sum() * 0  # keeps the graph, so that a first step without memories is no special case
    representative, diverse = zero, zero
    present = labels.unique().tolist()
    for label in present:
        mine = flat[labels == label] if counted is None else flat[(labels == label) & counted]
        if not len(mine):
            continue
        if label in real.queues:
            representative = representative + 1 - cosine_matrix(mine, real.queues[label]).min()
        if label in pseudo.queues:
            diverse = diverse + cosine_matrix(mine, pseudo.queues[label]).max()
    return representative / len(present), diverse / len(present)
