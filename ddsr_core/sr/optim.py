"""A step of Adam and the moving average, the same for every loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def new_adam(network: nn.Module, learning_rate: float, beta2: float = 0.99) -> torch.optim.Adam:
    """Adam (0.9, ``beta2``) as one kernel over all weights."""
    import torch

    return torch.optim.Adam(network.parameters(), lr=learning_rate, betas=(0.9, beta2), fused=True)


def descend(loss: Tensor, network: nn.Module, optimizer: torch.optim.Optimizer, rate: float, grad_clip: float) -> Tensor:
    """Backward, clip, step.

    Args:
        loss: scalar.
        network: whose weights ``optimizer`` holds.
        optimizer: its learning rate is set to ``rate``.
        rate: learning rate of this step.
        grad_clip: largest norm of the gradient.

    Returns:
        Norm of the gradient before the clip, on the device.
    """
    import torch

    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return norm


def ema_decay_at(decay: float, step: int) -> float:
    """``min(decay, (1 + t) / (10 + t))``: short memory at first, so that short runs do not keep their random start."""
    return min(decay, (1 + step) / (10 + step))


def update_ema(ema: nn.Module, network: nn.Module, decay: float) -> None:
    """``ema <- decay * ema + (1 - decay) * network``; buffers are copied."""
    import torch

    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - decay)
        for old, new in zip(ema.buffers(), network.buffers(), strict=True):
            old.copy_(new)
