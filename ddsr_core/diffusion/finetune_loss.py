"""The loss of fine-tuning (paper, equation 6): L_simple + λr L_r + λd L_d + λsr L_SR, and the variational bound.

L_simple (equation 2) and the bound are in `ddsr_core.diffusion.gaussian`, L_r and L_d (equations 3, 4) in
`ddsr_core.diffusion.minimax`, L_SR (equation 5) in `ddsr_core.diffusion.lsr`. This module adds them up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddsr_core.diffusion.base import Base
from ddsr_core.diffusion.codec import Codec
from ddsr_core.diffusion.config import FinetuneConfig
from ddsr_core.diffusion.gaussian import Schedule, predict_x0, q_sample, simple_and_vb
from ddsr_core.diffusion.lsr import crop, decoded_psnr_bic, lsr_loss
from ddsr_core.diffusion.minimax import Memories, minimax_losses
from ddsr_core.diffusion.training_set import Part
from ddsr_core.distributed import ProcessGroup

TERMS = ("simple", "vb", "r", "d", "sr")


class FinetuneLoss:
    """Equation 6 on one part of a batch.

    Attributes:
        base: the network, with DiffFit's parameters, and its VAE.
        decoder: VAE that L_SR decodes with: the base model's own, or a smaller one for the same latents.
        slice_decoder: L_SR decodes one image at a time, and again in the backward pass, to save memory.
        lsr_share: factor of ``lambda_sr``, 0 to 1; see `FinetuneTrainer.adapt_lsr`.
    """

    def __init__(self, base: Base, config: FinetuneConfig, decoder: Codec | None = None) -> None:
        self.base, self.config, self.decoder = base, config, decoder or base.codec
        self.device = next(base.dit.parameters()).device
        self.schedule = Schedule(self.device)
        self.half = config.precision == "bf16"
        self.slice_decoder, self.lsr_share = False, 1.0
        self.predict: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.compile(base.dit) if config.compile else base.dit

    def terms(
        self, part: Part, memories: Memories, group: ProcessGroup, *, retain: bool = False
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The weighted terms, and what goes into the memory of predictions.

        The network runs in ``config.precision``; noising, x0 and every loss are float32.

        Args:
            retain: the graph will be traversed more than once, as `gradients` does.

        Returns:
            The terms by name, scalars, and the predictions of all processes ``(B * group.count, C, h, w)``, detached.
        """
        config, batch = self.config, part.on_device
        x_t = q_sample(self.schedule, batch.x0, batch.t, batch.noise)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            # A compiled backward pass frees what the forward pass stored, so it can run only once.
            output = (self.base.dit if retain else self.predict)(x_t, batch.t, batch.y)
        output = output.float()
        mse, vb = simple_and_vb(self.schedule, output, batch.x0, x_t, batch.t, batch.noise)
        eps = output[:, : batch.x0.shape[1]]
        x0_hat = predict_x0(self.schedule, x_t, batch.t, eps)
        compared = x0_hat if config.x0_hat == "x0" else x_t - eps
        of_all = group.gather(compared)
        # The others' predictions are constants here; their own processes carry their gradient.
        start = group.rank * len(batch)
        joined = torch.cat([of_all[:start], compared, of_all[start + len(batch) :]])
        l_r, l_d = minimax_losses(joined, part.labels, memories, part.t <= config.minimax_last_step)
        terms = {
            "simple": mse.mean(),
            "vb": config.vb_weight * vb.mean(),
            "r": config.lambda_r * l_r,
            "d": config.lambda_d * l_d,
            "sr": config.lambda_sr * self.lsr_share * self._lsr(part, x0_hat),
        }
        return terms, of_all

    def _lsr(self, part: Part, x0_hat: Tensor) -> Tensor:
        config, x0, reference, t = self.config, part.on_device.x0, part.on_device.psnr_bic, part.on_host.t
        if config.lsr_crop_px is not None and config.lsr_mode != "off":
            x0_hat, x0 = (crop(latents, part.on_host.corner, config.lsr_crop_px) for latents in (x0_hat, x0))
        if config.lsr_mode == "target" and config.lsr_reference == "decoded":
            reference = decoded_psnr_bic(x0, t, self.decode, config.lsr_last_step, config.scale)
        limits = config.lsr_margin_db, config.lsr_last_step, config.scale
        return lsr_loss(config.lsr_mode, x0_hat, reference, t, self.schedule, self.decode, *limits)

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` in about [-1, 1] for L_SR, decoded in ``config.precision``."""
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.half):
            if not self.slice_decoder:
                return self.decoder.decode(latents)
            return torch.cat([recomputed(self.decoder.decode, latent[None]) for latent in latents])


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, computed again in the backward pass instead of storing its activations; it must not be random."""
    result: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return result


def total(terms: dict[str, Tensor], group: ProcessGroup) -> Tensor:
    """The loss whose gradient, averaged over the processes, is that of the whole batch."""
    return torch.stack([_scaled(name, term, group) for name, term in terms.items()]).sum()


def gradients(terms: dict[str, Tensor], parameters: Sequence[nn.Parameter], group: ProcessGroup) -> dict[str, list[Tensor]]:
    """Each term's own gradient of the whole batch, zeros where it has none; the graph is kept."""
    result = {}
    for name, term in terms.items():
        grads = torch.autograd.grad(_scaled(name, term, group), parameters, retain_graph=True, allow_unused=True)
        own = [torch.zeros_like(p) if g is None else g.float() for g, p in zip(grads, parameters, strict=True)]
        group.average_(own)
        result[name] = own
    return result


def _scaled(name: str, term: Tensor, group: ProcessGroup) -> Tensor:
    """Gradients are averaged over the processes; those of the minimax losses, which see the whole batch, are a sum."""
    return term * group.count if name in ("r", "d") else term
