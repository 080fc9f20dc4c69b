"""Stage 4, fine-tuning: DiffFit on the accepted patches with L_simple + λr L_r + λd L_d + λsr L_SR (paper, II-B).

The step is `training_step`, equation 6 as pure functions of tensors; around it: latents encoded once for both flips, an
average of the adapter alone, and checkpoints from which a killed run continues to the same bytes (on a CPU).
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ddsr_core.config import Runtime, StageConfig
from ddsr_core.errors import InputError, TrainingError
from ddsr_core.store import RESUME, Stage, StageResult, write_atomically, write_json

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from ddsr_core.diffusion.base import Base
    from ddsr_core.diffusion.gaussian import Schedule
    from ddsr_core.diffusion.minimax import Memory
    from ddsr_core.diffusion.training_set import Batch, TrainingSet

TERMS = ("simple", "vb", "r", "d", "sr")
#: A sample sheet: so many pseudo-labels at most, images of each, DPM-Solver++ steps. Few, as it interrupts training.
SHEET_LABELS, SHEET_COLUMNS, SHEET_STEPS = 16, 4, 12


class FinetuneConfig(StageConfig):
    """Budget, DiffFit, and the weights of the loss terms (equation 6)."""

    steps: int = Field(9_000, ge=1, description="optimiser steps")
    batch_size: int = Field(8, ge=1, le=4096, description="patches a step")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="of AdamW, constant, no weight decay")
    gamma_blocks: int = Field(14, ge=0, description="first blocks that get DiffFit scales; 14 of 28 as released")
    row_start: Literal["null", "table"] = Field(
        "null", description="first values of the pseudo-labels' class rows: the null row, or rows 0..k-1 as they are"
    )
    lambda_r: float = Field(0.002, ge=0, description="weight of the representativeness loss")
    lambda_d: float = Field(0.008, ge=0, description="weight of the diversity loss")
    memory_size: int = Field(64, ge=1, description="entries a pseudo-label in each memory")
    x0_hat: Literal["x0", "paper"] = Field("x0", description="prediction in the minimax losses: x0, or z_t - eps")
    lsr_mode: Literal["off", "paper", "target"] = Field("target", description="form of L_SR")
    lambda_sr: float = Field(1.0, ge=0, description="weight of L_SR")
    lsr_margin_db: float = Field(0.0, ge=0, description="how much smoother than the real patch is free, dB (target)")
    vb_weight: float = Field(1.0, ge=0, description="weight of the learned-variance bound")
    label_dropout: float = Field(0.1, ge=0, lt=1, description="share of samples shown with the null label")
    flip: bool = Field(True, description="mirror half of the patches")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="of the averaged adapter")
    ema_warmup: bool = Field(True, description="decay min(ema_decay, (1 + n) / (10 + n))")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="of the networks; the losses are float32")
    norm_every: int = Field(50, ge=1, description="steps between measurements of each term's gradient norm")
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints")
    sample_every: int = Field(1_000, ge=1, description="steps between sample sheets; one at the start and the end too")
    seed: int = Field(0, ge=0, description="of batches, noise and label dropout")


def loss_terms(
    base: Base, schedule: Schedule, batch: Batch, config: FinetuneConfig, real: Memory, pseudo: Memory
) -> tuple[dict[str, Tensor], Tensor]:
    """The terms of equation 6, already weighted, and the detached prediction of x0 for the memory.

    The network runs in ``config.precision``; noising, x0 and every loss are float32.
    """
    import torch

    from ddsr_core.diffusion.gaussian import predict_x0, q_sample, simple_and_vb
    from ddsr_core.diffusion.lsr import lsr_loss
    from ddsr_core.diffusion.minimax import minimax_losses

    x_t = q_sample(schedule, batch.x0, batch.t, batch.noise)
    half = config.precision == "bf16"
    with torch.autocast(x_t.device.type, torch.bfloat16, enabled=half):
        output = base.dit(x_t, batch.t, batch.y)
    output = output.float()
    mse, vb = simple_and_vb(schedule, output, batch.x0, x_t, batch.t, batch.noise)
    eps = output[:, : batch.x0.shape[1]]
    x0_hat = predict_x0(schedule, x_t, batch.t, eps)
    compared = x0_hat if config.x0_hat == "x0" else x_t - eps
    l_r, l_d = minimax_losses(compared, batch.labels, real, pseudo)

    def decode(latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=half):
            return base.decode(latents)

    l_sr = lsr_loss(config.lsr_mode, x0_hat, batch.psnr_bic, batch.t, schedule, decode, config.lsr_margin_db)
    terms = {
        "simple": mse.mean(),
        "vb": config.vb_weight * vb.mean(),
        "r": config.lambda_r * l_r,
        "d": config.lambda_d * l_d,
        "sr": config.lambda_sr * l_sr,
    }
    return terms, compared.detach()


def gradient_norms(terms: dict[str, Tensor], parameters: list[torch.nn.Parameter]) -> dict[str, float]:
    """Norm of each term's own gradient; the graph is kept."""
    import torch

    norms = {}
    for name, term in terms.items():
        grads = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        present = [g.float().norm() for g in grads if g is not None]
        norms[name] = float(torch.stack(present).norm()) if present else 0.0
    return norms


class Run:
    """The state that a fine-tuning run carries from step to step, and its checkpoint."""

    def __init__(self, base: Base, config: FinetuneConfig, label_map: dict[int, int]) -> None:
        import torch

        from ddsr_core.diffusion.difffit import initialize_rows, unfreeze
        from ddsr_core.diffusion.gaussian import Schedule
        from ddsr_core.diffusion.minimax import Memory

        self.base, self.config, self.label_map = base, config, label_map
        initialize_rows(base.dit, label_map, config.row_start)
        self.trainable = unfreeze(base.dit, config.gamma_blocks)
        self.ema = {name: p.detach().clone() for name, p in self.trainable.items()}
        parameters = list(self.trainable.values())
        self.optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0, fused=True)
        self.real, self.pseudo = Memory(config.memory_size), Memory(config.memory_size)
        self.schedule = Schedule(next(base.dit.parameters()).device)
        self.step = 0
        self.curve: list[dict[str, float]] = []

    def advance(self, data: TrainingSet) -> dict[str, float]:
        """One optimiser step; returns the value of every term, and now and then the norms of their gradients.

        Raises:
            TrainingError: a term or its gradient is not finite. Nothing has been updated then.
        """
        import torch

        batch = self._batch(data)
        terms, x0_hat = loss_terms(self.base, self.schedule, batch, self.config, self.real, self.pseudo)
        parameters = list(self.trainable.values())
        row = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))
        self._require_finite(row, "the loss term")
        if self.step % self.config.norm_every == 0:
            row |= {f"grad_{name}": norm for name, norm in gradient_norms(terms, parameters).items()}
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        gradient = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not math.isfinite(float(gradient)):
            again, _ = loss_terms(self.base, self.schedule, batch, self.config, self.real, self.pseudo)
            norms = {**gradient_norms(again, parameters), "sum": float(gradient)}
            self._require_finite(norms, "the gradient of the loss term")
        self.optimizer.step()
        self.real.append(batch.x0, batch.labels)
        self.pseudo.append(x0_hat, batch.labels)
        self._average()
        self.step += 1
        return row

    def _batch(self, data: TrainingSet) -> Batch:
        from ddsr_core.diffusion.training_set import draw_batch

        config = self.config
        batch = draw_batch(
            data, step=self.step, size=config.batch_size, null_row=self.base.null_row,
            label_dropout=config.label_dropout, flip=config.flip, seed=config.seed,
        )  # fmt: skip
        return batch.to(self.schedule.beta.device)

    def _require_finite(self, values: dict[str, float], what: str) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"{what} {name!r} is {value} at step {self.step}",
                    where="finetune",
                    mend=f"lower finetune.learning_rate or the weight of {name!r}; the last good checkpoint is kept",
                )

    def _average(self) -> None:
        import torch

        decay = self.config.ema_decay
        if self.config.ema_warmup:
            decay = min(decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), list(self.trainable.values()), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network with the averaged adapter for a while."""
        import torch

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
        import torch

        state = {
            "trainable": {name: p.detach() for name, p in self.trainable.items()},
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "real": self.real.state_dict(),
            "pseudo": self.pseudo.state_dict(),
            "step": self.step,
            "curve": self.curve,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(path, buffer.getvalue())

    def load(self, path: Path) -> None:
        import torch

        state = torch.load(path, weights_only=True, map_location=next(self.base.dit.parameters()).device)
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(state["trainable"][name])
        self.ema = state["ema"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.real.load_state_dict(state["real"])
        self.pseudo.load_state_dict(state["pseudo"])
        self.step, self.curve = state["step"], state["curve"]


def run(config: FinetuneConfig, *, patches: Path, clusters: Path, base: Path, out: Path, runtime: Runtime) -> StageResult:
    """Fine-tune the base on the patches; write the adapter, its average, the curves and samples along the way.

    Raises:
        MissingWeightsError, InputError: the base or the patches do not fit.
        TrainingError: a loss term is not finite; the last good checkpoint is kept.
    """
    from ddsr_core.diffusion.base import load_base
    from ddsr_core.diffusion.difffit import Adapter, extract, save_adapter, table_rows
    from ddsr_core.diffusion.training_set import prepare

    model = load_base(str(base), runtime.device)
    label_map = map_labels(clusters, model)
    data = prepare(model, patches, clusters, label_map, out, runtime)
    state = Run(model, config, label_map)
    checkpoint = out / RESUME / "checkpoint.pt"
    if checkpoint.exists():
        state.load(checkpoint)
    train(state, data, out, checkpoint, runtime)
    rows = table_rows(label_map, model.null_row)
    raw = Adapter(extract(state.trainable, rows), label_map, model.digest, config.gamma_blocks)
    facts = {"steps": config.steps, "config": config.model_dump(mode="json")}
    save_adapter(out, raw, extract(state.ema, rows), facts)
    write_curves(out, state.curve)
    last = {name: round(value, 5) for name, value in _mean_of_last(state.curve, 100).items()}
    counts = {
        "steps": config.steps,
        "patches": len(data.labels),
        "numbers": sum(t.numel() for t in raw.tensors.values()),
    }
    write_json(out / "summary.json", {**counts, "last_losses": last})
    return StageResult({**counts, **{f"loss_{name}": value for name, value in last.items()}})


def map_labels(clusters: Path, base: Base) -> dict[int, int]:
    """Pseudo-label -> row of the class table: rows 0..k-1, as explicit integers (folder names sort 10 before 2).

    Raises:
        InputError: more pseudo-labels than class rows.
    """
    k = int(json.loads((clusters / "summary.json").read_text())["k"])
    if k > base.dit.config.classes:
        raise InputError(
            f"{k} pseudo-labels do not fit the base's class table of {base.dit.config.classes} rows",
            where="clusters.k",
            mend=f"set clusters.k to at most {base.dit.config.classes}",
        )
    return {label: label for label in range(k)}


def train(state: Run, data: TrainingSet, out: Path, checkpoint: Path, runtime: Runtime) -> None:
    """Advance ``state`` to the last step, with sample sheets and checkpoints on the way."""
    config = state.config
    if state.step == 0:
        write_sheet(state, out)
    with runtime.progress("Fine-tuning", total=config.steps, unit="steps", done=state.step) as bar:
        while state.step < config.steps:
            try:
                row = state.advance(data)
            except TrainingError:
                state.save(checkpoint)  # of the state before the bad step
                raise
            state.curve.append({"step": state.step, **row})
            if state.step % config.sample_every == 0 or state.step == config.steps:
                write_sheet(state, out)
            if state.step % config.checkpoint_every == 0:
                state.save(checkpoint)
            if state.step % 10 == 0:
                bar.note(" ".join(f"{name} {row[name]:.3f}" for name in ("simple", "r", "d", "sr")))
            bar.advance()


def write_sheet(state: Run, out: Path) -> None:
    """``samples/step-000100.png``: a row a pseudo-label, drawn by the averaged adapter from the same noise."""
    from ddsr_core.images import save_png

    with state.averaged():
        save_png(out / "samples" / f"step-{state.step:06d}.png", draw_sheet(state))


def draw_sheet(state: Run) -> np.ndarray:
    """``uint8 (rows * H, columns * W, 3)``."""
    import torch

    from ddsr_core.diffusion.samplers import sample_latents
    from ddsr_core.images import from_signed, to_uint8

    device = state.schedule.beta.device
    table_rows = [row for _, row in sorted(state.label_map.items())][:SHEET_LABELS]
    parts = []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=state.config.precision == "bf16"):
        for index, row in enumerate(table_rows):
            latents = sample_latents(
                state.base.dit,
                torch.full((SHEET_COLUMNS,), row, device=device),
                [index * SHEET_COLUMNS + column for column in range(SHEET_COLUMNS)],
                seed=state.config.seed,
                sampler="dpmpp",
                steps=SHEET_STEPS,
                guidance_scale=1.0,
            )
            parts.append(from_signed(state.base.decode(latents).float()))
    images = torch.stack(parts)  # (rows, columns, 3, H, W)
    return to_uint8(images.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[None])[0]


def write_curves(out: Path, curve: list[dict[str, float]]) -> None:
    """``curves.csv``: the weighted terms, a row a step. ``gradients.csv``: their gradients' norms, where measured."""
    measured = [row for row in curve if f"grad_{TERMS[0]}" in row]
    for name, rows, prefix in (("curves.csv", curve, ""), ("gradients.csv", measured, "grad_")):
        lines = [",".join(("step", *TERMS))]
        for row in rows:
            lines.append(",".join((str(int(row["step"])), *(f"{row[prefix + term]:.6g}" for term in TERMS))))
        write_atomically(out / name, ("\n".join(lines) + "\n").encode())


def _mean_of_last(curve: list[dict[str, float]], count: int) -> dict[str, float]:
    rows = curve[-count:]
    return {name: sum(row[name] for row in rows) / len(rows) for name in TERMS}


STAGE = Stage("finetune", version=1, run=run)
