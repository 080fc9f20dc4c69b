"""The high-frequency loss L_SR (paper, equation 5) in three modes.

``off``: what the released code amounts to (its term has no gradient).
``pixels``: equation 5 as printed: minus the pixel error of the decoded x0 against its own bicubic round trip, at every
    t. Images are clamped to [-1, 1], which bounds the loss. It rewards whatever bicubic cannot carry, decoder artifacts
    included.
``target``: ours. One-sided and relative to the real patch: PSNR_bic of the decoded x0 must not exceed that of the real
    patch by more than a margin. It applies only where x0 can be predicted at all (signal above noise: t <= 258), weighted
    by alpha_bar, and is zero once the prediction is as detailed as the patch, so it cannot diverge.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddsr_core.diffusion.config import LAST_STEP_OF_SIGNAL, LsrMode
from ddsr_core.diffusion.gaussian import Schedule
from ddsr_core.diffusion.minimax import indices_of
from ddsr_core.imaging.bicubic import crop_to_multiple, downsample, psnr_bic, upsample
from ddsr_core.imaging.kernel import SCALE


def lsr_loss(
    mode: LsrMode,
    x0_hat: Tensor,
    real_psnr_bic: Tensor,
    t: Tensor,
    schedule: Schedule,
    decode: Callable[[Tensor], Tensor],
    margin_db: float = 0.0,
    last_step: int = LAST_STEP_OF_SIGNAL,
    scale: int = SCALE,
) -> Tensor:
    """L_SR of a batch; only the samples that count are decoded.

    Args:
        x0_hat: predicted latents ``float (B, C, h, w)``, with gradient.
        real_psnr_bic: PSNR_bic of the real patches ``(B,)``, dB (`psnr_bic`, antialiased kernel).
        t: ``(B,)`` on the CPU: it decides what is decoded.
        decode: latents to images ``(B, 3, H, W)`` in about [-1, 1]; differentiable, its weights frozen.
        margin_db: how much smoother than the real patch a prediction may be (``target``).
        last_step: the last t that counts (``target``).
        scale: factor of the bicubic round trip.

    Returns:
        Scalar, the mean over the whole batch.

    Raises:
        ValueError: unknown mode.
    """
    if mode == "off":
        return x0_hat.sum() * 0
    if mode == "pixels":
        images = crop_to_multiple(decode(x0_hat).float().clamp(-1, 1), scale)
        return -(images - upsample(downsample(images, scale), scale)).square().mean()
    if mode != "target":
        raise ValueError(f"unknown mode of L_SR: {mode}")
    if not (t <= last_step).any():
        return x0_hat.sum() * 0
    chosen = indices_of(t <= last_step, x0_hat.device)
    alpha_bar = schedule.alpha_bar[t[t <= last_step].to(x0_hat.device, non_blocking=True)]
    images = (decode(x0_hat[chosen]).float() + 1) / 2
    excess = psnr_bic(images, scale=scale) - real_psnr_bic[chosen] - margin_db
    return (alpha_bar * excess.relu() / 10).sum() / len(t)


def crop(latents: Tensor, corner: Tensor, px: int) -> Tensor:
    """A window ``(B, C, px, px)`` of every latent ``(B, C, h, w)``.

    Args:
        corner: ``(B, 2)`` on the CPU, in [0, 1): where the window lies, from the first possible place to the last.
    """
    room = torch.tensor([latents.shape[2] - px + 1, latents.shape[3] - px + 1])
    corners = (corner * room).long().tolist()
    return torch.stack([one[:, y : y + px, x : x + px] for one, (y, x) in zip(latents, corners, strict=True)])


@torch.no_grad()
def decoded_psnr_bic(
    latents: Tensor,
    t: Tensor,
    decode: Callable[[Tensor], Tensor],
    last_step: int = LAST_STEP_OF_SIGNAL,
    scale: int = SCALE,
) -> Tensor:
    """PSNR_bic ``(B,)``, dB, of real latents as the decoder shows them; NaN where `lsr_loss` does not use it.

    A prediction cannot bring back what the decoder smooths away, except as artifacts. This reference is within reach.

    Args:
        t: ``(B,)`` on the CPU.
    """
    values = torch.full((len(t),), torch.nan, device=latents.device)
    if (t <= last_step).any():
        chosen = indices_of(t <= last_step, latents.device)
        values[chosen] = psnr_bic((decode(latents[chosen]).float() + 1) / 2, scale=scale)
    return values
