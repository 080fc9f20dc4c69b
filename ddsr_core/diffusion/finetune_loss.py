"""One optimizer step of fine-tuning (paper, equation 6), and the state that is carried from step to step."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ddsr_core.diffusion.difffit import Adapter, initialize_rows, unfreeze
from ddsr_core.diffusion.distributed import ProcessGroup, SingleProcess
from ddsr_core.diffusion.gaussian import Schedule, predict_x0, q_sample, simple_and_vb
from ddsr_core.diffusion.lsr import crop, decoded_psnr_bic, lsr_loss
from ddsr_core.diffusion.minimax import Memory, minimax_losses
from ddsr_core.diffusion.training_set import Batch, TrainingSet, draw_batch
from ddsr_core.errors import InputError, TrainingError
from ddsr_core.storage.files import write_atomically

if TYPE_CHECKING:
    from ddsr_core.diffusion.base import Base
    from ddsr_core.diffusion.codec import Codec
    from ddsr_core.diffusion.dit import DiT, DiTConfig
    from ddsr_core.diffusion.finetune import FinetuneConfig

TERMS = ("simple", "vb", "r", "d", "sr")
#: Samples that are smoother than the patches by so much get the whole weight of L_SR.
LSR_BAND_DB = 1.0
#: Numbers kept for the backward pass of DiffFit, per token, width and block, with fused attention; measured on DiT-XL/2.
KEPT_PER_TOKEN = 16
#: Share of the free GPU memory that activations may take before blocks are recomputed instead.
MEMORY_SHARE = 0.7


class Step:
    """Equation 6 on one part of a batch.

    Attributes:
        base: the network, with DiffFit's parameters, and its VAE.
        decoder: what L_SR looks through: the base's own VAE, or a smaller one for the same latents.
        lsr_share: share of ``lambda_sr`` in force, 0 … 1; see `Run.adapt`.
    """

    def __init__(self, base: Base, config: FinetuneConfig, decoder: Codec | None = None) -> None:
        self.base, self.config, self.decoder = base, config, decoder or base.codec
        self.device = next(base.dit.parameters()).device
        self.schedule = Schedule(self.device)
        self.half = config.precision == "bf16"
        self.lsr_share = 1.0
        self.predict: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.compile(base.dit) if config.compile else base.dit

    def terms(
        self,
        batch: Batch,
        labels: Tensor,
        t: Tensor,
        real: Memory,
        pseudo: Memory,
        peers: ProcessGroup,
        *,
        retain: bool = False,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The weighted terms, and what goes into the memory of predictions.

        The network runs in ``config.precision``; noising, x0 and every loss are float32.

        Args:
            batch: this process's part.
            labels, t: of all processes' parts, in order.
            retain: the graph will be gone through more than once, as `gradients` does.

        Returns:
            The terms by name, scalars, and the predictions of all processes ``(B * peers.count, C, h, w)``, detached.
        """
        config = self.config
        x_t = q_sample(self.schedule, batch.x0, batch.t, batch.noise)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            # A compiled backward pass reuses the memory of what the forward pass kept, so it can run once only.
            output = (self.base.dit if retain else self.predict)(x_t, batch.t, batch.y)
        output = output.float()
        mse, vb = simple_and_vb(self.schedule, output, batch.x0, x_t, batch.t, batch.noise)
        eps = output[:, : batch.x0.shape[1]]
        x0_hat = predict_x0(self.schedule, x_t, batch.t, eps)
        compared = x0_hat if config.x0_hat == "x0" else x_t - eps
        everyone = peers.gather(compared)
        # The others' predictions are constants here; their own processes carry their gradient.
        start = peers.rank * len(batch)
        whole = torch.cat([everyone[:start], compared, everyone[start + len(batch) :]])
        l_r, l_d = minimax_losses(whole, labels, real, pseudo, t <= config.minimax_last_step)
        terms = {
            "simple": mse.mean(),
            "vb": config.vb_weight * vb.mean(),
            "r": config.lambda_r * l_r,
            "d": config.lambda_d * l_d,
            "sr": config.lambda_sr * self.lsr_share * self._lsr(batch, x0_hat),
        }
        return terms, everyone

    def _lsr(self, batch: Batch, x0_hat: Tensor) -> Tensor:
        config, x0, reference = self.config, batch.x0, batch.psnr_bic
        if config.lsr_crop_px is not None:
            x0_hat, x0 = (crop(latents, batch.corner, config.lsr_crop_px) for latents in (x0_hat, x0))
        if config.lsr_mode == "target" and config.lsr_reference == "decoded":
            reference = decoded_psnr_bic(x0, batch.t, self.decode, config.lsr_last_step)
        return lsr_loss(
            config.lsr_mode,
            x0_hat,
            reference,
            batch.t,
            self.schedule,
            self.decode,
            config.lsr_margin_db,
            config.lsr_last_step,
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` in about [-1, 1] as L_SR sees them, in ``config.precision``."""
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.half):
            return self.decoder.decode(latents)


def gradients(
    terms: dict[str, Tensor], parameters: Sequence[torch.nn.Parameter], peers: ProcessGroup
) -> dict[str, list[Tensor]]:
    """Each term's own gradient of the whole batch, zeros where it has none; the graph is kept."""
    result = {}
    for name, term in terms.items():
        grads = torch.autograd.grad(_scaled(name, term, peers), parameters, retain_graph=True, allow_unused=True)
        own = [torch.zeros_like(p) if g is None else g.float() for g, p in zip(grads, parameters, strict=True)]
        peers.average_(own)
        result[name] = own
    return result


def _scaled(name: str, term: Tensor, peers: ProcessGroup) -> Tensor:
    """Gradients are averaged over the processes; those of the minimax losses, which see the whole batch, are a sum."""
    return term * peers.count if name in ("r", "d") else term


class Run:
    """What a fine-tuning run carries from step to step, and its checkpoint.

    Attributes:
        trainable: DiffFit's parameters by name; ``ema``: their average.
        real, pseudo: the minimax memories, equal in all processes.
        curve: a row a step: every weighted term, and now and then the norms of their gradients.
        texture: a row a call of `adapt`.
    """

    def __init__(
        self,
        base: Base,
        config: FinetuneConfig,
        label_map: dict[int, int],
        *,
        decoder: Codec | None = None,
        rows: dict[int, list[int]] | None = None,
        peers: ProcessGroup | None = None,
    ) -> None:
        self.base, self.config, self.label_map, self.peers = base, config, label_map, peers or SingleProcess()
        initialize_rows(base.dit, label_map, config.class_row_init, rows)
        self.trainable = unfreeze(base.dit, config.gamma_blocks)
        self.ema = {name: p.detach().clone() for name, p in self.trainable.items()}
        self.optimizer = torch.optim.AdamW(
            list(self.trainable.values()), lr=config.learning_rate, weight_decay=0.0, fused=True
        )
        if config.precision == "bf16":
            keep_frozen_in_bf16(base.dit)
        self.real, self.pseudo = Memory(config.memory_size), Memory(config.memory_size)
        self.calculation = Step(base, config, decoder)
        self.schedule = self.calculation.schedule
        base.dit.checkpoint_blocks = wants_checkpointing(config, base.dit.config, self.calculation.device)
        self.step = 0
        self.curve: list[dict[str, float]] = []
        self.texture: list[dict[str, float]] = []

    def start_from(self, adapter: Adapter) -> None:
        """Begin with the numbers of an earlier adapter; the optimizer and the memories begin empty.

        Raises:
            InputError: it belongs to another base, or does not fit.
        """
        if adapter.gamma_blocks != self.config.gamma_blocks:
            raise InputError(
                f"the earlier adapter has scales in {adapter.gamma_blocks} blocks, not {self.config.gamma_blocks}",
                where="finetune.gamma_blocks",
                fix="keep gamma_blocks, or fine-tune without a start",
            )
        adapter.apply(self.base.dit, self.base.digest)
        self.ema = {name: p.detach().clone() for name, p in self.trainable.items()}

    def advance(self, data: TrainingSet) -> dict[str, float]:
        """One optimizer step; returns the value of every term, and now and then the norms of their gradients.

        Raises:
            TrainingError: a term or its gradient is not finite. Nothing has been updated then.
        """
        batch = self._draw(data)
        parameters = list(self.trainable.values())
        measured: dict[str, list[Tensor]] = {}
        self.optimizer.zero_grad(set_to_none=True)
        values, predictions = [], []
        measures = self.step % self.config.norm_every == 0
        for part, labels, t in self._parts(batch):
            terms, x0_hat = self.calculation.terms(part, labels, t, self.real, self.pseudo, self.peers, retain=measures)
            values.append(self._values(terms))
            if measures:
                measured = _sum(measured, gradients(terms, parameters, self.peers))
            loss = torch.stack([_scaled(name, term, self.peers) for name, term in terms.items()]).sum()
            (loss / self.config.accumulate).backward()
            predictions.append(x0_hat)
        self._update(batch, parameters)
        self._remember(batch, predictions)
        self._average()
        self.step += 1
        row = {name: sum(value[name] for value in values) / len(values) for name in values[0]}
        return row | {f"grad_{name}": _norm(grads) / self.config.accumulate for name, grads in measured.items()}

    def adapt(self, samples_db: float, real_db: float) -> None:
        """Weigh L_SR by how much smoother samples are than patches: fully from `LSR_BAND_DB` on, not at all below zero.

        L_SR `target` looks at predictions of x0, which are means, and smoother than any sample: by itself it never rests
        (left alone at weight 1 it took ddsr-tiny's samples from 25.8 dB to 20.4 in 300 steps, past the patches' 24.3).

        Args:
            samples_db, real_db: mean PSNR_bic of images that the averaged adapter draws, and of the patches.
        """
        self.calculation.lsr_share = min(1.0, max(0.0, (samples_db - real_db) / LSR_BAND_DB))
        row = {"samples_db": samples_db, "real_db": real_db, "lsr_share": self.calculation.lsr_share}
        self.texture.append({"step": self.step, **row})

    def _draw(self, data: TrainingSet) -> Batch:
        config = self.config
        batch = draw_batch(
            data, step=self.step, size=config.batch_size, null_row=self.base.null_row,
            label_dropout=config.label_dropout, flip=config.flip, seed=config.seed,
        )  # fmt: skip
        return batch.to(self.calculation.device)

    def _parts(self, batch: Batch) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """This process's parts of the batch, one after another, each with pseudo-labels and t of all processes' parts."""
        count = self.config.accumulate
        shares = [batch.part(rank, self.peers.count) for rank in range(self.peers.count)]
        for index in range(count):
            parts = [share.part(index, count) for share in shares]
            yield parts[self.peers.rank], torch.cat([p.labels for p in parts]), torch.cat([p.t for p in parts])

    def _values(self, terms: dict[str, Tensor]) -> dict[str, float]:
        mean = torch.stack([term.detach() for term in terms.values()])
        self.peers.average_([mean])
        row = dict(zip(terms, mean.tolist(), strict=True))
        self._require_finite(row, "the loss term")
        return row

    def _update(self, batch: Batch, parameters: list[torch.nn.Parameter]) -> None:
        grads = [p.grad for p in parameters if p.grad is not None]
        self.peers.average_(grads)
        norm = float(torch.nn.utils.get_total_norm(grads))
        if not math.isfinite(norm):
            self._require_finite({**self._norms_again(batch, parameters), "sum": norm}, "the gradient of the loss term")
        self.optimizer.step()

    def _norms_again(self, batch: Batch, parameters: list[torch.nn.Parameter]) -> dict[str, float]:
        """Which term it was: the parts once more, until one has a gradient that is not finite."""
        norms: dict[str, float] = {}
        for part, labels, t in self._parts(batch):
            terms, _ = self.calculation.terms(part, labels, t, self.real, self.pseudo, self.peers, retain=True)
            norms = {name: _norm(grads) for name, grads in gradients(terms, parameters, self.peers).items()}
            if not all(map(math.isfinite, norms.values())):
                break
        return norms

    def _require_finite(self, values: dict[str, float], what: str) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"{what} {name!r} is {value} at step {self.step}",
                    where="finetune",
                    fix=f"lower finetune.learning_rate or the weight of {name!r}; the last good checkpoint is kept",
                )

    def _remember(self, batch: Batch, predictions: list[Tensor]) -> None:
        """Append the batch to the memories, in its own order: process by process, part by part within one."""
        count = self.peers.count
        by_process = [torch.cat([part.chunk(count)[rank] for part in predictions]) for rank in range(count)]
        self.real.append(batch.x0, batch.labels)
        counted = batch.t <= self.config.minimax_last_step
        self.pseudo.append(torch.cat(by_process)[counted], batch.labels[counted])

    def _average(self) -> None:
        decay = self.config.ema_decay
        if self.config.ema_warmup:
            decay = min(decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), list(self.trainable.values()), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network with the averaged adapter for a while."""
        current: list[Tensor] = list(self.trainable.values())
        kept = [p.detach().clone() for p in current]
        with torch.no_grad():
            torch._foreach_copy_(current, list(self.ema.values()))
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(current, kept)

    def save(self, path: Path) -> None:
        """Write the checkpoint, atomically."""
        state = {
            "trainable": {name: p.detach() for name, p in self.trainable.items()},
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "real": self.real.state_dict(),
            "pseudo": self.pseudo.state_dict(),
            "step": self.step,
            "curve": self.curve,
            "texture": self.texture,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(path, buffer.getvalue())

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        state = torch.load(path, weights_only=True, map_location=self.calculation.device)
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(state["trainable"][name])
        self.ema = state["ema"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.real.load_state_dict(state["real"])
        self.pseudo.load_state_dict(state["pseudo"])
        self.step, self.curve, self.texture = state["step"], state["curve"], state["texture"]
        if self.texture:
            self.calculation.lsr_share = self.texture[-1]["lsr_share"]


def keep_frozen_in_bf16(dit: DiT) -> None:
    """Round the frozen matrices once instead of in every forward pass, as autocast would: the same products, less memory."""
    for module in dit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.bfloat16()


def _sum(a: dict[str, list[Tensor]], b: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    return {name: [x + y for x, y in zip(a[name], b[name], strict=True)] for name in b} if a else b


def _norm(grads: list[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm(grads))


def wants_checkpointing(config: FinetuneConfig, shape: DiTConfig, device: torch.device) -> bool:
    """Whether blocks are recomputed in the backward pass: as the config says, or where activations would not fit."""
    if config.checkpointing != "auto":
        return config.checkpointing == "on"
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return activation_bytes(config, shape) > MEMORY_SHARE * free


def activation_bytes(config: FinetuneConfig, shape: DiTConfig) -> int:
    """What the DiT keeps for the backward pass of one part of a batch, about: 1 GiB an image for DiT-XL/2-512 in bf16."""
    tokens = (shape.latent_px // shape.patch) ** 2
    images = config.batch_size // (config.accumulate * config.processes)
    return images * tokens * shape.hidden * shape.depth * KEPT_PER_TOKEN * (2 if config.precision == "bf16" else 4)
