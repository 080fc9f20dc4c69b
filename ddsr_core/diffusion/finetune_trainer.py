"""The state of a fine-tuning run: adapter, optimizer, average, minimax memories, curves, checkpoint."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddsr_core.diffusion.base import Base
from ddsr_core.diffusion.codec import Codec
from ddsr_core.diffusion.config import FinetuneConfig
from ddsr_core.diffusion.difffit import Adapter, initialize_rows, unfreeze
from ddsr_core.diffusion.dit import DiT
from ddsr_core.diffusion.finetune_loss import TERMS, FinetuneLoss, gradients, total
from ddsr_core.diffusion.memory import choose_checkpointing, free_memory
from ddsr_core.diffusion.minimax import Memories
from ddsr_core.diffusion.training_set import Batch, Part, TrainingSet, draw_batch, parts_of
from ddsr_core.distributed import ProcessGroup, SingleProcess
from ddsr_core.errors import InputError, TrainingError
from ddsr_core.storage.files import write_atomically

#: Samples that are smoother than the patches by this much get the full weight of L_SR.
LSR_BAND_DB = 1.0


class StepResult(NamedTuple):
    """The results of the parts of one step, on the device.

    Attributes:
        terms: values of the weighted terms, one tensor ``(len(TERMS),)`` per part.
        predictions: of all processes, one tensor per part.
        norms: gradient norm of each term, where measured.
    """

    terms: list[Tensor]
    predictions: list[Tensor]
    norms: dict[str, Tensor]


class FinetuneTrainer:
    """Fine-tunes a base model step by step (paper, II-B).

    Attributes:
        trainable: DiffFit's parameters by name; ``ema``: their running average.
        loss: equation 6.
        memories: of the minimax losses, equal in all processes.
        curve: one row per step: every weighted term, and from time to time the norms of their gradients.
        texture: one row per call of `adapt_lsr`.
    """

    def __init__(
        self,
        base: Base,
        config: FinetuneConfig,
        label_map: dict[int, int],
        *,
        decoder: Codec | None = None,
        rows: Mapping[int, Mapping[int, float]] | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.base, self.config, self.label_map, self.group = base, config, label_map, group or SingleProcess()
        initialize_rows(base.dit, label_map, config.class_row_init, rows)
        self.trainable = unfreeze(base.dit, config.gamma_blocks)
        self.ema = {name: p.detach().clone() for name, p in self.trainable.items()}
        self.optimizer = torch.optim.AdamW(
            list(self.trainable.values()), lr=config.learning_rate, weight_decay=0.0, fused=True
        )
        if config.precision == "bf16":
            keep_frozen_in_bf16(base.dit)
        self.memories = Memories.of_size(config.memory_size)
        self.loss = FinetuneLoss(base, config, decoder)
        free = free_memory(self.loss.device)
        checkpointing = choose_checkpointing(config, base.dit.config, self.loss.decoder, free)
        base.dit.checkpoint_blocks, self.loss.slice_decoder = checkpointing == "on", checkpointing in ("decoder", "on")
        self.step = 0
        self.curve: list[dict[str, float]] = []
        self.texture: list[dict[str, float]] = []

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.trainable.values())

    def continue_from(self, adapter: Adapter) -> None:
        """Start from the values of an earlier adapter. Optimizer and memories start empty.

        Raises:
            InputError: the adapter belongs to another base model, or does not fit.
        """
        if adapter.gamma_blocks != self.config.gamma_blocks:
            raise InputError(
                f"the earlier adapter has scales in {adapter.gamma_blocks} blocks, not {self.config.gamma_blocks}",
                where="finetune.gamma_blocks",
                fix="keep gamma_blocks, or fine-tune without an earlier adapter",
            )
        adapter.apply(self.base.dit, self.base.digest)
        self.ema = {name: p.detach().clone() for name, p in self.trainable.items()}

    def advance(self, data: TrainingSet) -> dict[str, float]:
        """One optimizer step. It synchronizes with a GPU once, before the update.

        Returns:
            The value of every term, and every ``norm_every`` steps the norms of their gradients (``grad_<term>``).

        Raises:
            TrainingError: a term or its gradient is not finite. Nothing has been updated in that case.
        """
        batch = self._draw(data)
        self.optimizer.zero_grad(set_to_none=True)
        result = self._backward(batch, measure=self.step % self.config.norm_every == 0)
        row = self._finite_values(batch, result)
        self.optimizer.step()
        self._remember(batch, result.predictions)
        self._average()
        self.step += 1
        return row

    def adapt_lsr(self, samples_db: float, real_db: float) -> None:
        """Weight L_SR by how much smoother samples are than patches: fully from `LSR_BAND_DB`, not at all below 0 dB.

        L_SR ``target`` sees predictions of x0, which are means and smoother than any sample, so it never vanishes on its
        own: at a constant weight of 1, it took ddsr-tiny's samples from 25.8 dB to 20.4 dB in 300 steps, past the 24.3 dB of
        the patches.

        Args:
            samples_db, real_db: mean PSNR_bic of samples of the averaged adapter, and of the patches.
        """
        self.loss.lsr_share = min(1.0, max(0.0, (samples_db - real_db) / LSR_BAND_DB))
        row = {"samples_db": samples_db, "real_db": real_db, "lsr_share": self.loss.lsr_share}
        self.texture.append({"step": self.step, **row})

    def _draw(self, data: TrainingSet) -> Batch:
        config = self.config
        return draw_batch(
            data, step=self.step, size=config.batch_size, null_row=self.base.null_row,
            label_dropout=config.label_dropout, flip=config.flip, seed=config.seed,
        )  # fmt: skip

    def _parts(self, batch: Batch) -> Iterator[Part]:
        return parts_of(batch, self.loss.device, self.group.rank, self.group.count, self.config.accumulate)

    def _backward(self, batch: Batch, measure: bool) -> StepResult:
        """Accumulate the gradient of the batch, part by part."""
        measured: dict[str, list[Tensor]] = {}
        values, predictions = [], []
        for part in self._parts(batch):
            terms, predicted = self.loss.terms(part, self.memories, self.group, retain=measure)
            mean = torch.stack([term.detach() for term in terms.values()])
            self.group.average_([mean])
            values.append(mean)
            if measure:
                measured = _sum(measured, gradients(terms, self.parameters, self.group))
            (total(terms, self.group) / self.config.accumulate).backward()
            predictions.append(predicted)
        grads = [p.grad for p in self.parameters if p.grad is not None]
        self.group.average_(grads)
        norms = {name: torch.nn.utils.get_total_norm(grads) for name, grads in {**measured, "sum": grads}.items()}
        return StepResult(values, predictions, norms)

    def _finite_values(self, batch: Batch, result: StepResult) -> dict[str, float]:
        """Terms and norms as numbers. This is the only point of a step that waits for a GPU.

        Raises:
            TrainingError: one of them is not finite.
        """
        numbers = torch.cat([*result.terms, torch.stack(list(result.norms.values()))]).tolist()
        parts = [
            dict(zip(TERMS, numbers[start:], strict=False)) for start in range(0, len(TERMS) * len(result.terms), len(TERMS))
        ]
        norms = dict(zip(result.norms, numbers[len(TERMS) * len(result.terms) :], strict=True))
        for part in parts:
            self._require_finite(part, "the loss term")
        if not math.isfinite(norms["sum"]):
            self._require_finite({**self._norms_again(batch), "sum": norms["sum"]}, "the gradient of the loss term")
        row = {name: sum(part[name] for part in parts) / len(parts) for name in TERMS}
        return row | {f"grad_{name}": norm / self.config.accumulate for name, norm in norms.items() if name != "sum"}

    def _norms_again(self, batch: Batch) -> dict[str, float]:
        """Gradient norm of each term, computed part by part until one is not finite: to name the term."""
        norms: dict[str, float] = {}
        for part in self._parts(batch):
            terms, _ = self.loss.terms(part, self.memories, self.group, retain=True)
            by_term = gradients(terms, self.parameters, self.group)
            norms = {name: float(torch.nn.utils.get_total_norm(grads)) for name, grads in by_term.items()}
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
        processes = self.group.count
        by_process = [torch.cat([part.chunk(processes)[rank] for part in predictions]) for rank in range(processes)]
        self.memories.real.append(batch.x0.to(self.loss.device, non_blocking=True), batch.labels)
        self.memories.predicted.append(torch.cat(by_process), batch.labels, batch.t <= self.config.minimax_last_step)

    def _average(self) -> None:
        decay = self.config.ema_decay
        if self.config.ema_warmup:
            decay = min(decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), list(self.trainable.values()), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the averaged adapter in the network inside the context."""
        current: list[Tensor] = list(self.trainable.values())
        last = [p.detach().clone() for p in current]
        with torch.no_grad():
            torch._foreach_copy_(current, list(self.ema.values()))
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(current, last)

    def save(self, path: Path) -> None:
        """Write the checkpoint, atomically."""
        state = {
            "trainable": {name: p.detach() for name, p in self.trainable.items()},
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "memories": self.memories.state_dict(),
            "step": self.step,
            "curve": self.curve,
            "texture": self.texture,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(path, buffer.getvalue())

    def load(self, path: Path) -> None:
        """Resume from a checkpoint."""
        state = torch.load(path, weights_only=True, map_location=self.loss.device)
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(state["trainable"][name])
        self.ema = state["ema"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.memories.load_state_dict(state["memories"])
        self.step, self.curve, self.texture = state["step"], state["curve"], state["texture"]
        if self.texture:
            self.loss.lsr_share = self.texture[-1]["lsr_share"]


def keep_frozen_in_bf16(dit: DiT) -> None:
    """Round the frozen matrices once instead of in every forward pass, as autocast would: equal products, less memory."""
    for module in dit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.bfloat16()


def _sum(a: dict[str, list[Tensor]], b: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    return {name: [x + y for x, y in zip(a[name], b[name], strict=True)] for name in b} if a else b
