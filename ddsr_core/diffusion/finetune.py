"""Stage 4, fine-tuning: DiffFit on the accepted patches with L_simple + λr L_r + λd L_d + λsr L_SR (paper, II-B).

Equation 6 and its optimizer step are in `ddsr_core.diffusion.finetune_loss`. Here is what lies around them: the budget,
sample sheets on the way, checkpoints from which a killed run continues to the same bytes (on a CPU), and the adapter.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from ddsr_core.config import Runtime, StageConfig
from ddsr_core.errors import InputError, TrainingError
from ddsr_core.storage.files import write_atomically, write_json
from ddsr_core.storage.stage import RESUME, Stage, StageResult

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ddsr_core.diffusion.base import Base
    from ddsr_core.diffusion.distributed import ProcessGroup
    from ddsr_core.diffusion.finetune_loss import Run
    from ddsr_core.diffusion.training_set import TrainingSet

#: A sample sheet: so many pseudo-labels at most, images of each, DPM-Solver++ steps. Few, as it interrupts training.
SHEET_LABELS, SHEET_COLUMNS, SHEET_STEPS = 16, 4, 12
#: Images that are drawn to see how much texture samples have, and how many at a time.
TEXTURE_SAMPLES, DRAW_BATCH = 42, 16


class FinetuneConfig(StageConfig):
    """Budget, DiffFit, and the weights of the loss terms (equation 6)."""

    steps: int | None = Field(None, ge=0, description="optimizer steps; 0 leaves the base as it is. This or epochs")
    epochs: int | None = Field(70, ge=1, description="times that every patch is shown. This or steps")
    batch_size: int = Field(8, ge=1, le=4096, description="patches a step")
    accumulate: int = Field(
        1, ge=1, description="parts that a batch is computed in, one after another, to save memory; each has its own r and d"
    )
    processes: int = Field(1, ge=1, le=64, description="processes that share every batch, one a GPU")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="of AdamW, constant, no weight decay")
    gamma_blocks: int = Field(14, ge=0, description="first blocks that get DiffFit scales; 14 of 28 as released, 28 for all")
    class_row_init: Literal["imagenet_rows", "null", "clip_nearest"] = Field(
        "null",
        description="first values of the pseudo-labels' class rows: rows 0..k-1 as they are (released), the null row, or "
        "the mean of the classes whose names are nearest the cluster in CLIP's space",
    )
    lambda_r: float = Field(0.002, ge=0, description="weight of the representativeness loss")
    lambda_d: float = Field(0.008, ge=0, description="weight of the diversity loss")
    memory_size: int = Field(64, ge=1, description="entries a pseudo-label in each memory")
    minimax_last_step: int = Field(
        258,
        ge=0,
        le=999,
        description="last t whose predictions the minimax losses and their memory take: 258 is the last "
        "above a signal-to-noise ratio of one; 999 as released",
    )
    x0_hat: Literal["x0", "paper"] = Field("x0", description="prediction in the minimax losses: x0, or z_t - eps")
    lsr_mode: Literal["off", "paper", "target"] = Field("target", description="form of L_SR")
    lambda_sr: float = Field(1.0, ge=0, description="weight of L_SR")
    lsr_reference: Literal["patch", "decoded"] = Field(
        "decoded",
        description="whose PSNR_bic a prediction is measured against (target): the patch's, or its decoded latent's",
    )
    lsr_crop_px: int | None = Field(
        None, ge=8, description="L_SR decodes a window of so many latent pixels; none: all. For decoders that are large"
    )
    lsr_last_step: int = Field(
        258, ge=0, le=999, description="last t that counts (target); 258 is the last above a signal-to-noise ratio of one"
    )
    lsr_adapt_every: int | None = Field(
        500,
        ge=1,
        description="steps between looks at samples, by which L_SR is weighed (target): less the nearer their PSNR_bic is "
        "to the patches', none below; null: always lambda_sr",
    )
    lsr_margin_db: float = Field(0.0, ge=0, description="how much smoother than the real patch is free, dB (target)")
    vb_weight: float = Field(1.0, ge=0, description="weight of the learned-variance bound")
    label_dropout: float = Field(0.1, ge=0, lt=1, description="share of samples shown with the null label")
    flip: bool = Field(True, description="mirror half of the patches")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="of the averaged adapter")
    ema_warmup: bool = Field(True, description="decay min(ema_decay, (1 + n) / (10 + n))")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="of the networks; the losses are float32")
    checkpointing: Literal["auto", "on", "off"] = Field(
        "auto", description="recompute blocks in the backward pass; auto: where activations would not fit the GPU"
    )
    compile: bool = Field(False, description="torch.compile the network; pays over thousands of steps on a GPU")
    norm_every: int = Field(50, ge=1, description="steps between measurements of each term's gradient norm")
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints")
    sample_every: int = Field(1_000, ge=1, description="steps between sample sheets; one at the start and the end too")
    seed: int = Field(0, ge=0, description="of batches, noise and label dropout")

    @field_validator("class_row_init", mode="before")
    @classmethod
    def _null_is_a_name(cls, value: object) -> object:
        return "null" if value is None else value  # ``--set finetune.class_row_init=null`` reads as no value elsewhere

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set either steps or epochs, and the other to null")
        if self.batch_size % (self.accumulate * self.processes):
            raise ValueError("batch_size must be a multiple of accumulate x processes")
        if self.lsr_crop_px is not None and self.lsr_mode == "target" and self.lsr_reference == "patch":
            raise ValueError("a crop has no PSNR_bic of its patch: set lsr_reference to decoded")
        return self

    def total_steps(self, patches: int) -> int:
        """Optimizer steps for so many patches."""
        return self.steps if self.steps is not None else -(-(self.epochs or 0) * patches // self.batch_size)


def run(
    config: FinetuneConfig,
    *,
    latents: Path,
    clusters: Path,
    base: Path,
    out: Path,
    runtime: Runtime,
    vae: Path | None = None,
    decoder: Path | None = None,
    rows: Path | None = None,
    start: Path | None = None,
    start_clusters: Path | None = None,
) -> StageResult:
    """Fine-tune the base on the patches; write the adapter, its average, the curves and samples along the way.

    Args:
        vae: VAE in place of the base's own.
        decoder: VAE that L_SR decodes with, such as TAESD; none: the base's.
        rows: a `class_rows` artifact, for ``class_row_init="clip_nearest"``.
        start: `finetune` artifact to go on from, with ``start_clusters``, the clusters that it was made with.

    Raises:
        MissingWeightsError, InputError: the base, the latents or the clusters do not fit.
        TrainingError: a loss term is not finite; the last good checkpoint is kept.
    """
    from ddsr_core.diffusion.distributed import SingleProcess, run_together

    work = partial(
        train_in_process, config=config, latents=latents, clusters=clusters, base=base, out=out, vae=vae, decoder=decoder,
        rows=rows, start=start, start_clusters=start_clusters,
    )  # fmt: skip
    if config.processes == 1:
        work(SingleProcess(), runtime)
    else:
        run_together(work, config.processes, out, runtime)
    counts = json.loads((out / "summary.json").read_text())
    last = counts.pop("last_losses")
    return StageResult({**counts, **{f"loss_{name}": value for name, value in last.items()}})


def train_in_process(
    peers: ProcessGroup,
    runtime: Runtime,
    *,
    config: FinetuneConfig,
    latents: Path,
    clusters: Path,
    base: Path,
    out: Path,
    vae: Path | None,
    decoder: Path | None,
    rows: Path | None,
    start: Path | None,
    start_clusters: Path | None,
) -> None:
    """All of the stage in one of its processes; process 0 writes."""
    from ddsr_core.diffusion.base import load_base
    from ddsr_core.diffusion.codec import load_codec
    from ddsr_core.diffusion.finetune_loss import Run
    from ddsr_core.diffusion.from_adapter import load_start
    from ddsr_core.diffusion.training_set import load_training_set

    model = load_base(str(base), runtime.device, vae)
    label_map = map_labels(clusters, model)
    data = load_training_set(latents, clusters, label_map)
    require_fit(model, data)
    state = Run(
        model, config, label_map, peers=peers,
        decoder=load_codec(decoder, runtime.device) if decoder else None,
        rows=read_rows(rows) if rows else None,
    )  # fmt: skip
    checkpoint = out / RESUME / "checkpoint.pt"
    if checkpoint.exists():
        state.load(checkpoint)
    elif start is not None and start_clusters is not None:
        state.start_from(load_start(start, start_clusters, clusters, label_map))
    steps = config.total_steps(len(data))
    train(state, data, steps, out, checkpoint, runtime)
    if peers.rank == 0:
        write_outputs(state, steps, len(data), out)


def require_fit(model: Base, data: TrainingSet) -> None:
    """Raises InputError: the latents are not of the shape that the base works on."""
    shape, dit = data.latents.mean.shape[2:], model.dit.config
    if shape != (dit.in_channels, dit.latent_px, dit.latent_px):
        raise InputError(
            f"latents of {shape} do not fit a DiT for {(dit.in_channels, dit.latent_px, dit.latent_px)}",
            where="latents",
            fix="encode the patches with the VAE of this base",
        )


def read_rows(folder: Path) -> dict[int, list[int]]:
    """Pseudo-label -> rows of the class table to start from, of a `class_rows` artifact."""
    rows = json.loads((folder / "rows.json").read_text())["rows"]
    return {int(label): [int(row) for row in nearest] for label, nearest in rows.items()}


def write_outputs(state: Run, steps: int, patches: int, out: Path) -> None:
    """The adapter, its average, curves and summary of a finished run."""
    from ddsr_core.diffusion.difffit import Adapter, extract, save_adapter, table_rows

    config = state.config
    rows = table_rows(state.label_map, state.base.null_row)
    raw = Adapter(extract(state.trainable, rows), state.label_map, state.base.digest, config.gamma_blocks)
    save_adapter(out, raw, extract(state.ema, rows), {"steps": steps, "config": config.model_dump(mode="json")})
    write_curves(out, state.curve)
    write_texture(out, state.texture)
    last = {name: round(value, 5) for name, value in _mean_of_last(state.curve, 100).items()}
    numbers = sum(tensor.numel() for tensor in raw.tensors.values())
    facts = {"steps": steps, "patches": patches, "numbers": numbers, "base": state.base.info.name}
    write_json(out / "summary.json", {**facts, "license": state.base.info.license, "last_losses": last})


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
            fix=f"set clusters.k to at most {base.dit.config.classes}",
        )
    return {label: label for label in range(k)}


def train(state: Run, data: TrainingSet, steps: int, out: Path, checkpoint: Path, runtime: Runtime) -> None:
    """Advance ``state`` to the last step, with sample sheets and checkpoints on the way."""
    config, writes = state.config, state.peers.rank == 0
    if state.step == 0 and writes:
        write_sheet(state, out)
    adapts = config.lsr_adapt_every if config.lsr_mode == "target" and config.lambda_sr > 0 else None
    with runtime.progress("Fine-tuning", total=steps, unit="steps", done=state.step) as bar:
        while state.step < steps:
            if adapts and state.step % adapts == 0 and not (state.texture and state.texture[-1]["step"] == state.step):
                state.adapt(*look_at_texture(state, data))
            try:
                row = state.advance(data)
            except TrainingError:
                if writes:
                    state.save(checkpoint)  # of the state before the bad step
                raise
            state.curve.append({"step": state.step, **row})
            if writes and (state.step % config.sample_every == 0 or state.step == steps):
                write_sheet(state, out)
            if writes and state.step % config.checkpoint_every == 0:
                state.save(checkpoint)
            if state.step % 10 == 0:
                bar.note(" ".join(f"{name} {row[name]:.3f}" for name in ("simple", "r", "d", "sr")))
            bar.advance()


def look_at_texture(state: Run, data: TrainingSet) -> tuple[float, float]:
    """Mean PSNR_bic, dB, of `TEXTURE_SAMPLES` images of the averaged adapter, from the same noise each time; of the patches.

    Every pseudo-label counts alike on both sides, as it does in the distilled set.
    """
    import torch

    from ddsr_core.imaging.bicubic import psnr_bic

    labels = sorted(state.label_map)
    per_label = -(-TEXTURE_SAMPLES // len(labels))
    with state.averaged():
        images = draw(state, [state.label_map[label] for label in labels for _ in range(per_label)])
    real = torch.from_numpy(data.latents.psnr_bic)
    of_labels = torch.stack([real[data.labels == label].mean() for label in labels if (data.labels == label).any()])
    return float(psnr_bic(images).mean()), float(of_labels.mean())


def write_sheet(state: Run, out: Path) -> None:
    """``samples/step-000100.png``: a row a pseudo-label, drawn by the averaged adapter from the same noise."""
    from ddsr_core.imaging.images import save_png

    with state.averaged():
        save_png(out / "samples" / f"step-{state.step:06d}.png", draw_sheet(state))


def draw_sheet(state: Run) -> np.ndarray:
    """``uint8 (rows * H, columns * W, 3)``."""
    from ddsr_core.imaging.images import to_uint8

    rows = [row for _, row in sorted(state.label_map.items())][:SHEET_LABELS]
    images = draw(state, [row for row in rows for _ in range(SHEET_COLUMNS)])
    grid = images.unflatten(0, (len(rows), SHEET_COLUMNS))  # (rows, columns, 3, H, W)
    return to_uint8(grid.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[None])[0]


def draw(state: Run, rows: list[int]) -> Tensor:
    """Images ``float32 (len(rows), 3, H, W)`` in [0, 1], on the CPU, one for each row of the class table."""
    import torch

    from ddsr_core.diffusion.samplers import sample_latents
    from ddsr_core.imaging.images import from_signed

    device, parts = state.schedule.beta.device, []
    half = state.config.precision == "bf16"
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        for start in range(0, len(rows), DRAW_BATCH):
            some = torch.tensor(rows[start : start + DRAW_BATCH], device=device)
            indices = list(range(start, start + len(some)))
            latents = sample_latents(
                state.base.dit, some, indices, seed=state.config.seed, sampler="dpmpp", steps=SHEET_STEPS, guidance_scale=1.0
            )
            parts.append(from_signed(state.base.decode(latents).float()).clamp(0, 1).cpu())
    return torch.cat(parts)


def write_curves(out: Path, curve: list[dict[str, float]]) -> None:
    """``curves.csv``: the weighted terms, a row a step. ``gradients.csv``: their gradients' norms, where measured."""
    from ddsr_core.diffusion.finetune_loss import TERMS

    measured = [row for row in curve if f"grad_{TERMS[0]}" in row]
    for name, rows, prefix in (("curves.csv", curve, ""), ("gradients.csv", measured, "grad_")):
        lines = [",".join(("step", *TERMS))]
        for row in rows:
            lines.append(",".join((str(int(row["step"])), *(f"{row[prefix + term]:.6g}" for term in TERMS))))
        write_atomically(out / name, ("\n".join(lines) + "\n").encode())


def write_texture(out: Path, texture: list[dict[str, float]]) -> None:
    """``texture.csv``: PSNR_bic of samples and patches, and the share of L_SR's weight that followed from them."""
    names = ("step", "samples_db", "real_db", "lsr_share")
    lines = [",".join(names)] + [",".join(f"{row[name]:.6g}" for name in names) for row in texture]
    write_atomically(out / "texture.csv", ("\n".join(lines) + "\n").encode())


def _mean_of_last(curve: list[dict[str, float]], count: int) -> dict[str, float]:
    rows = curve[-count:]
    names = [name for name in rows[0] if name != "step" and not name.startswith("grad_")] if rows else []
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}


STAGE = Stage("finetune", version=2, run=run, config=FinetuneConfig, section="II-B", on_gpu=True)
