"""Stage 4, fine-tuning: DiffFit on the accepted patches with L_simple + λr L_r + λd L_d + λsr L_SR (paper, II-B).

The step is `training_step`, equation 6 as pure functions of tensors; around it: latents encoded once for both flips, an
average of the adapter alone, and checkpoints from which a killed run continues to the same bytes (on a CPU).
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ddsr_core.config import Runtime, StageConfig
from ddsr_core.errors import InputError, TrainingError
from ddsr_core.store import RESUME, Stage, StageResult, write_atomically, write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ddsr_core.diffusion.base import Base
    from ddsr_core.diffusion.gaussian import Schedule
    from ddsr_core.diffusion.minimax import Memory

ENCODE_BATCH = 16
#: The terms of equation 6, and the bound of the learned variance.
TERMS = ("simple", "vb", "r", "d", "sr")


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
    seed: int = Field(0, ge=0, description="of batches, noise and label dropout")


@dataclass(frozen=True)
class TrainingSet:
    """Everything about the patches that a step needs.

    Attributes:
        latents: ``float16 (2, N, C, h, w)``: as they are, mirrored.
        labels: pseudo-labels ``int64 (N,)``.
        psnr_bic: of the patches, antialiased kernel, ``float32 (N,)``, dB.
        rows: pseudo-label -> row of the class table, ``int64 (k,)``.
    """

    latents: Tensor
    labels: Tensor
    psnr_bic: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Batch:
    """One step's random choices: ``x0, noise (B, C, h, w)``, ``t, y (table rows), labels, psnr_bic (B,)``."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    y: Tensor
    labels: Tensor
    psnr_bic: Tensor


def draw_batch(data: TrainingSet, config: FinetuneConfig, null_row: int, step: int) -> Batch:
    """Batch ``step``, from a generator of its own; the label is dropped once, here, and not inside the network."""
    import torch

    from ddsr_core.diffusion.gaussian import STEPS

    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    size = config.batch_size
    chosen = torch.randint(len(data.labels), (size,), generator=generator)
    mirrored = torch.randint(2, (size,), generator=generator) * int(config.flip)
    dropped = torch.rand(size, generator=generator) < config.label_dropout
    t = torch.randint(STEPS, (size,), generator=generator)
    x0 = data.latents[mirrored, chosen].float()
    labels = data.labels[chosen]
    y = torch.where(dropped, null_row, data.rows[labels])
    return Batch(x0, torch.randn(x0.shape, generator=generator), t, y, labels, data.psnr_bic[chosen])


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
        norms[f"grad_{name}"] = float(torch.stack(present).norm()) if present else 0.0
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
            TrainingError: a term is not finite. Nothing has been updated then.
        """
        import torch

        batch = draw_batch(data, self.config, self.base.null_row, self.step)
        terms, x0_hat = loss_terms(self.base, self.schedule, batch, self.config, self.real, self.pseudo)
        row = {name: float(term.detach()) for name, term in terms.items()}
        for name, value in row.items():
            if not torch.isfinite(torch.tensor(value)):
                raise TrainingError(
                    f"the loss term {name!r} is {value} at step {self.step}",
                    where="finetune",
                    mend=f"lower finetune.learning_rate or the weight of {name!r}; the last checkpoint is kept",
                )
        if self.step % self.config.norm_every == 0:
            row |= gradient_norms(terms, list(self.trainable.values()))
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        self.optimizer.step()
        self.real.append(batch.x0, batch.labels)
        self.pseudo.append(x0_hat, batch.labels)
        self._average()
        self.step += 1
        return row

    def _average(self) -> None:
        import torch

        decay = self.config.ema_decay
        if self.config.ema_warmup:
            decay = min(decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), list(self.trainable.values()), 1 - decay)

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


def run(
    config: FinetuneConfig, *, patches: Path, clusters: Path, base: Path, out: Path, runtime: Runtime
) -> StageResult:
    """Fine-tune the base on the patches; write the adapter, its average, the curves and samples along the way.

    Raises:
        MissingWeightsError, InputError: the base or the patches do not fit.
        TrainingError: a loss term is not finite; the last good checkpoint is kept.
    """
    from ddsr_core.diffusion.base import load_base
    from ddsr_core.diffusion.difffit import Adapter, extract, save_adapter, table_rows

    model = load_base(str(base), runtime.device)
    data = prepare(model, patches, clusters, out, runtime)
    label_map = {label: label for label in range(len(data.rows))}
    state = Run(model, config, label_map)
    checkpoint = out / RESUME / "checkpoint.pt"
    if checkpoint.exists():
        state.load(checkpoint)
    with runtime.progress("Fine-tuning", total=config.steps, unit="steps", done=state.step) as bar:
        while state.step < config.steps:
            row = state.advance(data)
            state.curve.append({"step": state.step, **row})
            bar.advance()
            if state.step % 10 == 0:
                bar.note(" ".join(f"{name} {row[name]:.3f}" for name in ("simple", "r", "d", "sr")))
            if state.step % config.checkpoint_every == 0:
                state.save(checkpoint)
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


def prepare(base: Base, patches: Path, clusters: Path, out: Path, runtime: Runtime) -> TrainingSet:
    """Encode every patch and its mirror image once; kept in ``out/resume``.

    Raises:
        InputError: the patches have another size than the base makes, or more pseudo-labels than class rows.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from ddsr_core.clusters import read_labels

    path = out / RESUME / "latents.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = encode_patches(base, patches, read_labels(clusters), runtime)
        save_file(tensors, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    stored = load_file(path, device=runtime.device)
    k = int(json.loads((clusters / "summary.json").read_text())["k"])
    if k > base.dit.config.classes:
        raise InputError(
            f"{k} pseudo-labels do not fit the base's class table of {base.dit.config.classes} rows",
            where="clusters.k",
            mend=f"set clusters.k to at most {base.dit.config.classes}",
        )
    return TrainingSet(**stored, rows=torch.arange(k))


def encode_patches(base: Base, patches: Path, labels: dict[str, int], runtime: Runtime) -> dict[str, Tensor]:
    """``latents``, ``labels`` and ``psnr_bic`` of all patches, in their order (see `TrainingSet`)."""
    import torch

    from ddsr_core.bicubic import psnr_bic
    from ddsr_core.images import to_float, to_signed

    parts: dict[str, list[Tensor]] = {"plain": [], "mirrored": [], "psnr_bic": []}
    ordered: list[int] = []
    with runtime.progress("Encoding patches", total=len(labels), unit="patches") as bar, torch.inference_mode():
        for names, images in batches_of_patches(patches, base.image_px):
            x = to_float(images).to(runtime.device)
            parts["plain"].append(base.encode(to_signed(x)).half())
            parts["mirrored"].append(base.encode(to_signed(x.flip(3))).half())
            parts["psnr_bic"].append(psnr_bic(x))
            ordered += [labels[name] for name in names]
            bar.advance(len(names))
    latents = torch.stack([torch.cat(parts["plain"]), torch.cat(parts["mirrored"])]).contiguous()
    return {"latents": latents, "labels": torch.tensor(ordered), "psnr_bic": torch.cat(parts["psnr_bic"])}


def batches_of_patches(patches: Path, image_px: int) -> Iterator[tuple[list[str], Any]]:
    """Ids and pixels ``uint8 (n, H, W, 3)`` of the accepted patches, a few at a time.

    Raises:
        InputError: a patch has another size than ``image_px``.
    """
    import numpy as np

    from ddsr_core.images import decode_rgb, read_image_parquet

    names: list[str] = []
    images: list[Any] = []
    for row in read_image_parquet(patches, ["image", "patch_id"]):
        image = decode_rgb(row["image"]["bytes"], row["patch_id"])
        if image.shape[:2] != (image_px, image_px):
            raise InputError(
                f"the base makes images of {image_px}x{image_px}, the patches are {image.shape[1]}x{image.shape[0]}",
                where="patches.patch_px",
                mend=f"set patches.patch_px={image_px}, or choose another base",
            )
        names.append(row["patch_id"])
        images.append(image)
        if len(names) == ENCODE_BATCH:
            yield names, np.stack(images)
            names, images = [], []
    if names:
        yield names, np.stack(images)


def write_curves(out: Path, curve: list[dict[str, float]]) -> None:
    """``curves.csv``: each term a step; ``gradients.csv``: the norms of their gradients, where they were measured."""
    for name, columns in (("curves.csv", list(TERMS)), ("gradients.csv", [f"grad_{term}" for term in TERMS])):
        lines = [",".join(["step", *columns])]
        for row in curve:
            if columns[0] in row:
                lines.append(",".join([str(int(row["step"])), *(f"{row[column]:.6g}" for column in columns)]))
        write_atomically(out / name, ("\n".join(lines) + "\n").encode())


def _mean_of_last(curve: list[dict[str, float]], count: int) -> dict[str, float]:
    rows = curve[-count:]
    return {name: sum(row[name] for row in rows) / len(rows) for name in TERMS}


STAGE = Stage("finetune", version=1, run=run)
