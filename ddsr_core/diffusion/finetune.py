"""Stage 5, fine-tuning: DiffFit on the accepted patches with the loss of equation 6 (paper, II-B).

The loss is in `ddsr_core.diffusion.finetune_loss`, a step and its state in `ddsr_core.diffusion.finetune_trainer`. This
module has the rest: inputs, the loop, sample sheets, checkpoints, and the files of the adapter. A run that is killed
resumes from its last checkpoint and, on a CPU, ends with the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ddsr_core.config import Runtime
from ddsr_core.diffusion.base import Base, load_base
from ddsr_core.diffusion.codec import load_codec
from ddsr_core.diffusion.config import ClassRowInit, FinetuneConfig
from ddsr_core.diffusion.difffit import Adapter, extract, save_adapter, table_rows
from ddsr_core.diffusion.finetune_loss import TERMS
from ddsr_core.diffusion.finetune_samples import measure_texture, write_sheet
from ddsr_core.diffusion.finetune_trainer import FinetuneTrainer
from ddsr_core.diffusion.from_adapter import load_for_labels
from ddsr_core.diffusion.training_set import TrainingSet, load_training_set
from ddsr_core.distributed import ProcessGroup, SingleProcess, run_together
from ddsr_core.errors import InputError, TrainingError
from ddsr_core.reporters import Reporter, named
from ddsr_core.storage.files import write_atomically, write_json
from ddsr_core.storage.stage import RESUME, Stage, StageResult

#: Steps that the losses in the summary are averaged over.
LAST_STEPS = 100
#: Points of a reported curve.
CURVE_POINTS = 200


@dataclass(frozen=True)
class Inputs:
    """Folders that the stage reads; see `run`."""

    latents: Path
    clusters: Path
    base: Path
    vae: Path | None
    decoder: Path | None
    rows: Path | None
    from_adapter: Path | None
    from_clusters: Path | None


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
    from_adapter: Path | None = None,
    from_clusters: Path | None = None,
) -> StageResult:
    """Fine-tune the base model on the patches; write the adapter, its average, the curves, and samples along the way.

    Args:
        vae: VAE that replaces the base model's own.
        decoder: VAE that L_SR decodes with, such as TAESD; by default the base model's.
        rows: `class_rows` artifact, for rows that start at the nearest classes of the base model.
        from_adapter: `finetune` artifact to continue from, with ``from_clusters``, the clusters that it was made with.

    Raises:
        MissingWeightsError, InputError: the base model, the latents or the clusters do not fit.
        TrainingError: a loss term is not finite; the last good checkpoint is kept.
    """
    inputs = Inputs(latents, clusters, base, vae, decoder, rows, from_adapter, from_clusters)
    work = partial(finetune_in_process, config=config, inputs=inputs, out=out)
    if config.processes == 1:
        work(SingleProcess(), runtime)
    else:
        run_together(work, config.processes, out, runtime)
    counts = json.loads((out / "summary.json").read_text())
    last = counts.pop("last_losses")
    return StageResult({**counts, **{f"loss_{name}": value for name, value in last.items()}})


def finetune_in_process(group: ProcessGroup, runtime: Runtime, *, config: FinetuneConfig, inputs: Inputs, out: Path) -> None:
    """The entire stage in one of its processes. Process 0 writes."""
    model = load_base(str(inputs.base), runtime.device, inputs.vae)
    label_map = map_labels(inputs.clusters, model)
    data = load_training_set(inputs.latents, inputs.clusters, label_map)
    require_fit(model, data)
    trainer = FinetuneTrainer(
        model, config, label_map, group=group,
        decoder=load_codec(inputs.decoder, runtime.device) if inputs.decoder else None,
        rows=read_rows(inputs.rows) if inputs.rows else None,
    )  # fmt: skip
    checkpoint = out / RESUME / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
    elif inputs.from_adapter is not None and inputs.from_clusters is not None:
        earlier = load_for_labels(inputs.from_adapter, inputs.from_clusters, inputs.clusters, label_map)
        trainer.continue_from(earlier)
    train(trainer, data, out, runtime)
    if group.rank == 0:
        write_outputs(trainer, len(data), out, rows_given=inputs.rows is not None)


def train(trainer: FinetuneTrainer, data: TrainingSet, out: Path, runtime: Runtime) -> None:
    """Advance ``trainer`` to its last step, with sample sheets and checkpoints along the way."""
    config, writes, steps = trainer.config, trainer.group.rank == 0, trainer.config.total_steps(len(data))
    checkpoint = out / RESUME / "checkpoint.pt"
    writes_sheets = writes and config.sample_every is not None
    if trainer.step == 0 and writes_sheets:
        write_sheet(trainer, out)
    with (
        runtime.progress("Fine-tuning", total=steps, unit="steps", done=trainer.step) as bar,
        runtime.reporter("finetune", config.model_dump(mode="json")) as reporter,
    ):
        while trainer.step < steps:
            if texture_is_due(trainer):
                trainer.adapt_lsr(*measure_texture(trainer, data))
                reporter.scalars(named("texture", trainer.texture[-1]), trainer.step)
            try:
                row = trainer.advance(data)
            except TrainingError:
                if writes:
                    trainer.save(checkpoint)  # the state before the bad step
                raise
            trainer.curve.append({"step": trainer.step, **row})
            report(trainer, steps, reporter)
            if writes_sheets and (trainer.step % (config.sample_every or 1) == 0 or trainer.step == steps):
                reporter.picture("samples", write_sheet(trainer, out), trainer.step)
            if writes and trainer.step % config.checkpoint_every == 0:
                trainer.save(checkpoint)
            if trainer.step % 10 == 0:
                bar.note(" ".join(f"{name} {row[name]:.3f}" for name in ("simple", "r", "d", "sr")))
            bar.advance()


def report(trainer: FinetuneTrainer, steps: int, reporter: Reporter) -> None:
    """Report the mean of each term over the last steps, `CURVE_POINTS` times in all, and gradient norms if measured."""
    every = max(1, steps // CURVE_POINTS)
    row = trainer.curve[-1]
    reporter.scalars(
        {name.replace("grad_", "gradients/"): row[name] for name in row if name.startswith("grad_")}, trainer.step
    )
    if trainer.step % every == 0 or trainer.step == steps:
        means = _mean_of_last(trainer.curve, (trainer.step - 1) % every + 1)
        reporter.scalars({**named("train", means), "train/learning_rate": trainer.config.learning_rate}, trainer.step)


def texture_is_due(trainer: FinetuneTrainer) -> bool:
    """Whether the weight of L_SR has to be adapted before this step, and has not been, in a run that was resumed."""
    config, last = trainer.config, trainer.texture[-1]["step"] if trainer.texture else None
    return config.adapts_lsr and trainer.step % (config.lsr_adapt_every or 1) == 0 and last != trainer.step


def require_fit(model: Base, data: TrainingSet) -> None:
    """Check that the latents have the shape that the base model works on.

    Raises:
        InputError: they do not.
    """
    shape, dit = data.latents.mean.shape[2:], model.dit.config
    if shape != (dit.in_channels, dit.latent_px, dit.latent_px):
        raise InputError(
            f"latents of {shape} do not fit a DiT for {(dit.in_channels, dit.latent_px, dit.latent_px)}",
            where="latents",
            fix="encode the patches with the VAE of this base",
        )


def resolved_init(init: ClassRowInit, rows_given: bool) -> ClassRowInit:
    """What ``auto`` stands for: the nearest classes if the base model has class centers, and so a `class_rows` artifact."""
    if init != "auto":
        return init
    return "nearest_classes" if rows_given else "null"


def read_rows(folder: Path) -> dict[int, dict[int, float]]:
    """Pseudo-label -> row of the class table to start from -> its weight, of a `class_rows` artifact."""
    found = json.loads((folder / "rows.json").read_text())
    return {
        int(label): dict(zip(map(int, rows), found["weights"][label], strict=True)) for label, rows in found["rows"].items()
    }


def map_labels(clusters: Path, base: Base) -> dict[int, int]:
    """Pseudo-label -> row of the class table: rows 0 to k-1, as explicit integers (folder names sort 10 before 2).

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


def write_outputs(trainer: FinetuneTrainer, patches: int, out: Path, *, rows_given: bool) -> None:
    """The adapter, its average, curves and summary of a finished run.

    Args:
        rows_given: whether it had a `class_rows` artifact.
    """
    config, base = trainer.config, trainer.base
    rows = table_rows(trainer.label_map, base.null_row)
    raw = Adapter(extract(trainer.trainable, rows), trainer.label_map, base.digest, config.gamma_blocks)
    facts = {"steps": trainer.step, "config": config.model_dump(mode="json")}
    save_adapter(out, raw, extract(trainer.ema, rows), facts)
    write_curves(out, trainer.curve)
    write_texture(out, trainer.texture)
    summary = {
        "steps": trainer.step,
        "patches": patches,
        "epochs": round(trainer.step * config.batch_size / patches, 3),
        "class_row_init": resolved_init(config.class_row_init, rows_given),
        "numbers": sum(tensor.numel() for tensor in raw.tensors.values()),
        "base": base.info.name,
        "license": base.info.license,
        "last_losses": _mean_of_last(trainer.curve, LAST_STEPS),
    }
    write_json(out / "summary.json", summary)


def write_curves(out: Path, curve: list[dict[str, float]]) -> None:
    """``curves.csv``: the weighted terms, one row per step. ``gradients.csv``: gradient norms, where measured."""
    measured = [row for row in curve if f"grad_{TERMS[0]}" in row]
    for name, rows, prefix in (("curves.csv", curve, ""), ("gradients.csv", measured, "grad_")):
        _write_csv(
            out / name, ("step", *TERMS), [[int(row["step"]), *(row[prefix + term] for term in TERMS)] for row in rows]
        )


def write_texture(out: Path, texture: list[dict[str, float]]) -> None:
    """``texture.csv``: PSNR_bic of samples and patches, and the share of L_SR's weight that followed from them."""
    names = ("step", "samples_db", "real_db", "lsr_share")
    _write_csv(out / "texture.csv", names, [[row[name] for name in names] for row in texture])


def _write_csv(path: Path, names: tuple[str, ...], rows: list[list[float]]) -> None:
    lines = [",".join(names)] + [",".join(str(v) if isinstance(v, int) else f"{v:.6g}" for v in row) for row in rows]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def _mean_of_last(curve: list[dict[str, float]], count: int) -> Mapping[str, float]:
    rows = curve[-count:]
    return {name: round(sum(row[name] for row in rows) / len(rows), 5) for name in TERMS} if rows else {}


STAGE = Stage(
    "finetune",
    version=3,
    run=run,
    config=FinetuneConfig,
    section="II-B",
    on_gpu=True,
    words="fine-tuned adapter, {steps:,} steps",
)
