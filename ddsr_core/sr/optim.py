"""One step of Adam, and the exponential moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddsr_core.distributed import ProcessGroup, SingleProcess

ONE_PROCESS = SingleProcess()


def new_adam(network: nn.Module, learning_rate: float, beta2: float = 0.99) -> torch.optim.Adam:
    """Fused Adam with betas (0.9, ``beta2``) over all weights."""
    return torch.optim.Adam(network.parameters(), lr=learning_rate, betas=(0.9, beta2), fused=True)


def descend(
    loss: Tensor,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: float,
    grad_clip: float,
    group: ProcessGroup = ONE_PROCESS,
) -> Tensor:
    """One optimizer step: backward, average over the processes, clip, update.

    Args:
        loss: scalar.
        network: the module whose weights ``optimizer`` updates.
        optimizer: its learning rate is set to ``rate``.
        rate: learning rate of this step.
        grad_clip: largest gradient norm.
        group: processes that share the step.

    Returns:
        Gradient norm before clipping: a scalar on the device.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    group.average_([parameter.grad for parameter in network.parameters() if parameter.grad is not None])
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), grad_clip)
    for settings in optimizer.param_groups:
        settings["lr"] = rate
    optimizer.step()
    return norm


def ema_decay_at(decay: float, step: int) -> float:
    """``min(decay, (1 + step) / (10 + step))``: a warm-up, so that short trainings do not average in their random start."""
    return min(decay, (1 + step) / (10 + step))


def update_ema(ema: nn.Module, network: nn.Module, decay: float) -> None:
    """``ema <- decay * ema + (1 - decay) * network``. Buffers are copied."""
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - decay)
        for old, new in zip(ema.buffers(), network.buffers(), strict=True):
            old.copy_(new)
