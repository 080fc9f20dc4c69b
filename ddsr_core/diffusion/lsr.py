"""The high-frequency term L_SR (paper, equation 5) in three modes.

``off``: what the released code amounts to (its term has no gradient).
``paper``: minus the pixel error of the decoded x0 against its own x4 bicubic round trip, at every t, images clamped to
    [-1, 1] to give it a bound. Rewards whatever bicubic cannot carry, decoder artifacts included.
``target``: ours. One-sided and relative to the real patch: PSNR_bic of the decoded x0 must not exceed that of the real
    one by more than a margin; only where x0 can be predicted at all (signal above noise, t <= 258, or less), weighted by
    alpha_bar. Zero once the prediction is as detailed as the patch, so it cannot run away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ddsr_core.diffusion.gaussian import Schedule
from ddsr_core.imaging.bicubic import downsample, psnr_bic, upsample

Mode = Literal["off", "paper", "target"]
#: The last step at which alpha_bar >= 1/2, that is a signal-to-noise ratio of at least one.
LAST_STEP = 258


def lsr_loss(
    mode: Mode,
    x0_hat: Tensor,
    real_psnr_bic: Tensor,
    t: Tensor,
    schedule: Schedule,
    decode: Callable[[Tensor], Tensor],
    margin_db: float = 0.0,
    last_step: int = LAST_STEP,
) -> Tensor:
    """L_SR of a batch; only the samples that count are decoded.

    Args:
        x0_hat: predicted latents ``float (B, C, h, w)``, with gradient.
        real_psnr_bic: PSNR_bic of the real patches ``(B,)``, dB (`psnr_bic`, antialiased kernel).
        t: ``(B,)``.
        decode: latents to images ``(B, 3, H, W)`` in about [-1, 1], differentiable, its weights frozen.
        margin_db: how much smoother than the real patch a prediction may be (``target``).
        last_step: the last t that counts (``target``).

    Returns:
        Scalar, the mean over the whole batch.
    """
    if mode == "off":
        return x0_hat.sum() * 0
    if mode == "paper":
        images = decode(x0_hat).float().clamp(-1, 1)
        return -(images - upsample(downsample(images))).square().mean()
    chosen = torch.nonzero(t <= last_step).flatten()
    if not len(chosen):
        return x0_hat.sum() * 0
    images = (decode(x0_hat[chosen]).float() + 1) / 2
    excess = psnr_bic(images) - real_psnr_bic[chosen] - margin_db
    return (schedule.alpha_bar[t[chosen]] * excess.relu() / 10).sum() / len(t)


def crop(latents: Tensor, corner: Tensor, px: int) -> Tensor:
    """A window ``(B, C, px, px)`` of every latent ``(B, C, h, w)``, its corner at ``corner (B, 2)``, a share in [0, 1)."""
    room = torch.tensor([latents.shape[2] - px + 1, latents.shape[3] - px + 1])
    corners = (corner.cpu() * room).long().tolist()
    return torch.stack([one[:, y : y + px, x : x + px] for one, (y, x) in zip(latents, corners, strict=True)])


@torch.no_grad()
def decoded_psnr_bic(latents: Tensor, t: Tensor, decode: Callable[[Tensor], Tensor], last_step: int = LAST_STEP) -> Tensor:
    """PSNR_bic ``(B,)``, dB, of real latents as the decoder shows them; NaN where `lsr_loss` does not ask.

    What a decoder smooths away no prediction can bring back without artifacts: this is the reference that it can reach.
    """
    values = torch.full((len(t),), torch.nan, device=latents.device)
    chosen = torch.nonzero(t <= last_step).flatten()
    if len(chosen):
        values[chosen] = psnr_bic((decode(latents[chosen]).float() + 1) / 2)
    return values
