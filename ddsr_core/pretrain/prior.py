"""The diffusion prior of a base model: a class-conditional DiT on the autoencoder's latents.

A run that was stopped continues from its last checkpoint and ends with the same bytes as one that never stopped: every
batch depends on seed and step alone, and AdamW's moments are rounded to bfloat16 at every checkpoint, in the run
itself, so that nothing is lost by storing them in half the space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddsr_core.diffusion.dit import DiT, DiTConfig
from ddsr_core.diffusion.gaussian import STEPS, Schedule, at, q_sample, simple_and_vb
from ddsr_core.errors import TrainingError
from ddsr_core.pretrain.checkpoints import save_checkpoint
from ddsr_core.pretrain.config import PretrainConfig
from ddsr_core.progress import Bar, ProgressFactory, silent
from ddsr_core.reporters import Reporter, named

#: Steps that one row of the curve averages.
CURVE_EVERY = 25
#: Cap of the signal-to-noise ratio in the loss weights of ``min_snr`` (Hang et al. 2023).
SNR_CAP = 5.0


@torch.inference_mode()
def encode_all(encoder: nn.Module, patches: np.ndarray, batch: int = 256, progress: ProgressFactory = silent) -> Tensor:
    """Latents of every patch and its mirror image: ``float16 (2, N, C, h, w)``."""
    both: list[list[Tensor]] = [[], []]
    with progress("Encoding patches", total=len(patches), unit="patches") as bar:
        for start in range(0, len(patches), batch):
            chunk = torch.from_numpy(np.array(patches[start : start + batch])).permute(0, 3, 1, 2).float() / 127.5 - 1
            for flipped, part in enumerate(both):
                with torch.autocast("cpu", torch.bfloat16):
                    part.append(encoder(chunk.flip(3) if flipped else chunk).half().contiguous())
            bar.advance(len(chunk))
    return torch.stack([torch.cat(part) for part in both])


def channel_statistics(latents: Tensor) -> tuple[list[float], list[float]]:
    """Per-channel mean, and one over the standard deviation, of ``(2, N, C, h, w)``."""
    flat = latents.float().permute(2, 0, 1, 3, 4).flatten(1)
    return flat.mean(1).tolist(), (1 / flat.std(1)).tolist()


@dataclass(frozen=True)
class PriorData:
    """What the prior is trained on.

    Attributes:
        latents: normalized, ``(2, N, C, h, w)``: as they are, mirrored.
        classes: one per patch, ``int64 (N,)``.
        tokens: features to align with, ``float16 (N, grid * grid, dims)``; dims may be 0.
    """

    latents: Tensor
    classes: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Batch:
    """``x0 (B, C, h, w)``, rows of the class table ``y``, timesteps ``t``, ``noise``, token features ``tokens``."""

    x0: Tensor
    y: Tensor
    t: Tensor
    noise: Tensor
    tokens: Tensor


def prior_batch(data: PriorData, config: PretrainConfig, step: int) -> Batch:
    """Batch ``step`` of the run; labels are dropped here."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    size = config.prior_batch
    chosen = torch.randint(data.latents.shape[1], (size,), generator=generator)
    mirrored = torch.randint(2, (size,), generator=generator)
    x0 = data.latents[mirrored, chosen].float()
    dropped = torch.rand(size, generator=generator) < config.label_dropout
    y = torch.where(dropped, config.classes, data.classes[chosen])
    if config.timestep_weighting == "logit_normal":
        t = (torch.randn(size, generator=generator).sigmoid() * STEPS).long().clamp(max=STEPS - 1)
    else:
        t = torch.randint(STEPS, (size,), generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    tokens = data.tokens[chosen].float() if config.repa_weight else x0.new_empty(0)
    return Batch(x0, y, t, noise, mirror_tokens(tokens, mirrored) if config.repa_weight else tokens)


def mirror_tokens(tokens: Tensor, mirrored: Tensor) -> Tensor:
    """Token maps ``(B, grid * grid, dims)`` flipped from left to right where ``mirrored`` is 1."""
    grid = round(tokens.shape[1] ** 0.5)
    flipped = tokens.unflatten(1, (grid, grid)).flip(2).flatten(1, 2)
    return torch.where(mirrored[:, None, None] == 1, flipped, tokens)


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Linear warm-up, constant, linear down to zero over the last ``decay_share`` of the steps."""
    decay = max(1, round(config.prior_steps * config.decay_share))
    left = (config.prior_steps - step) / decay
    return config.prior_learning_rate * min(1.0, (step + 1) / config.prior_warmup, left)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Exponential moving average with warm-up: ``min(decay, (1 + step) / (10 + step))``."""
    factor = min(decay, (1 + step) / (10 + step))
    averaged: list[Tensor] = list(ema.parameters())
    current: list[Tensor] = list(model.parameters())
    torch._foreach_lerp_(averaged, current, 1 - factor)


class AlignmentHead(nn.Sequential):
    """Maps tokens of the DiT ``(B, N, hidden)`` to features ``(B, N, dims)``; used in training only (REPA)."""

    def __init__(self, hidden: int, dims: int) -> None:
        super().__init__(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dims))

    def initialize(self, generator: torch.Generator) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.xavier_uniform_(parameter, generator=generator)


class PriorTrainer:
    """The state of one run: networks, averaged weights, optimizer, step, curve."""

    def __init__(self, config: PretrainConfig, data: PriorData) -> None:
        self.config, self.data = config, data
        shape = DiTConfig(
            latent_px=data.latents.shape[-1], in_channels=data.latents.shape[2], hidden=config.hidden,
            depth=config.depth, heads=config.heads, classes=config.classes,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(config.seed)
        self.model, self.ema = DiT(shape), DiT(shape)
        self.model.initialize(generator)
        nn.init.normal_(self.model.y_embedder.embedding_table.weight, std=config.row_std, generator=generator)
        self.head = AlignmentHead(config.hidden, max(1, data.tokens.shape[2]))
        self.head.initialize(generator)
        self.ema.load_state_dict(self.model.state_dict())
        self.ema.requires_grad_(False)
        self.schedule = Schedule()
        trained = [*self.model.parameters(), *(self.head.parameters() if config.repa_weight else ())]
        self.trained = [p for p in trained if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=config.prior_learning_rate, weight_decay=0.0, fused=True)
        self.step = 0
        self.curve: list[dict[str, float]] = []
        self.scores: list[dict[str, float]] = []
        self._sums: dict[str, float] = {}
        self._hidden: Tensor | None = None
        if config.compile:
            self.model.compile()
        if config.repa_weight:
            self.model.layers[config.repa_block - 1].register_forward_hook(self._keep_hidden)

    def _keep_hidden(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._hidden = output

    def advance(self) -> dict[str, float]:
        """One optimizer step. Returns each term of the loss.

        Raises:
            TrainingError: the loss is not finite.
        """
        config, batch = self.config, prior_batch(self.data, self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        x_t = q_sample(self.schedule, batch.x0, batch.t, batch.noise)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # on CPUs the fused backward is slow
            output = self.model(x_t, batch.t, batch.y)
        mse, vb = simple_and_vb(self.schedule, output, batch.x0, x_t, batch.t, batch.noise)
        terms = {"mse": (self._loss_weights(batch.t) * mse).mean(), "vb": vb.mean()}
        if config.repa_weight:
            terms["repa"] = config.repa_weight * self._misalignment(batch.tokens)
        loss = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(loss):
            raise TrainingError(
                "the loss of the diffusion prior is not finite",
                where=f"step {self.step}",
                fix="lower prior_learning_rate",
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        update_ema(self.ema, self.model, self.step, config.ema_decay)
        self.step += 1
        values = {name: float(term.detach()) for name, term in terms.items()}
        self._note(values)
        return values

    def _loss_weights(self, t: Tensor) -> Tensor:
        if self.config.timestep_weighting != "min_snr":
            return torch.ones(len(t))
        alpha_bar = at(self.schedule.alpha_bar, t).flatten()
        snr = alpha_bar / (1 - alpha_bar)
        return snr.clamp(max=SNR_CAP) / snr

    def _misalignment(self, tokens: Tensor) -> Tensor:
        """One minus the mean cosine of projected tokens and features."""
        assert self._hidden is not None
        with torch.autocast("cpu", torch.bfloat16):
            projected = self.head(self._hidden)
        self._hidden = None
        return 1 - F.cosine_similarity(projected.float(), tokens, dim=-1).mean()

    def _note(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        if self.step % CURVE_EVERY == 0:
            self.curve.append({"step": self.step, **{name: value / CURVE_EVERY for name, value in self._sums.items()}})
            self._sums = {}

    def checkpoint(self) -> dict[str, Any]:
        """Everything that `restore` needs. Rounds the moments in the checkpoint and in the running optimizer."""
        moments: dict[str, list[Tensor]] = {"exp_avg": [], "exp_avg_sq": []}
        for parameter in self.trained:
            for name, kept in moments.items():
                moment = self.optimizer.state[parameter][name]
                kept.append(moment.bfloat16())
                moment.copy_(kept[-1].float())
        return {
            "step": self.step, "curve": self.curve, "scores": self.scores, "sums": self._sums,
            "model": self.model.state_dict(), "ema": self.ema.state_dict(), "head": self.head.state_dict(), **moments,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `checkpoint`."""
        self.step, self.curve, self.scores, self._sums = (state[name] for name in ("step", "curve", "scores", "sums"))
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.head.load_state_dict(state["head"])
        for index, parameter in enumerate(self.trained):
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": state["exp_avg"][index].float(),
                "exp_avg_sq": state["exp_avg_sq"][index].float(),
            }


def train_prior(
    trainer: PriorTrainer, path: Path, bar: Bar, reporter: Reporter, on_score: Callable[[PriorTrainer], None]
) -> None:
    """Train to the end, with a checkpoint in ``path`` every ``checkpoint_every`` steps and a score every ``score_every``."""
    config = trainer.config
    while trainer.step < config.prior_steps:
        values = trainer.advance()
        bar.advance()
        last = trainer.step == config.prior_steps
        if trainer.step % CURVE_EVERY == 0:
            bar.note(" ".join(f"{name} {value:.4f}" for name, value in values.items()))
            rate = learning_rate(config, trainer.step - 1)
            reporter.scalars({**named("train", trainer.curve[-1]), "train/learning_rate": rate}, trainer.step)
        if trainer.step % config.score_every == 0 or last:
            on_score(trainer)
        if trainer.step % config.checkpoint_every == 0 or last:
            save_checkpoint(path, trainer.checkpoint())
