"""Fine-tuning on a random base of 16-pixel images: exact resume, errors that name the term, how batches are drawn."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ddsr_core.config import Runtime
from ddsr_core.diffusion import finetune
from ddsr_core.diffusion.base import Base, load_base
from ddsr_core.diffusion.config import FinetuneConfig
from ddsr_core.diffusion.difffit import ROWS, load_adapter
from ddsr_core.diffusion.distributed import SingleProcess
from ddsr_core.diffusion.dit import DIT_XL_2_512
from ddsr_core.diffusion.finetune_loss import TERMS, FinetuneLoss
from ddsr_core.diffusion.finetune_trainer import (
    FinetuneTrainer,
    activation_bytes,
    keep_frozen_in_bf16,
    wants_checkpointing,
)
from ddsr_core.diffusion.training_set import (
    Batch,
    Part,
    TrainingSet,
    draw_batch,
    load_training_set,
    parts_of,
    patches_of_step,
)
from ddsr_core.errors import InputError, TrainingError
from ddsr_core.progress import Bar
from tests.helpers.interruption import Killed, digests, killing_after
from tests.helpers.tiny_base import SHAPE, write_base, write_clusters, write_latents, write_patches

CONFIG = FinetuneConfig(
    steps=12, epochs=None, batch_size=6, gamma_blocks=2, memory_size=5, ema_decay=0.9,
    norm_every=5, checkpoint_every=4, sample_every=6, lsr_adapt_every=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("inputs")
    patches, base = write_patches(home / "patches"), write_base(home / "base")
    return {
        "latents": write_latents(home / "latents", patches, base),
        "clusters": write_clusters(home / "clusters"),
        "base": base,
    }


@pytest.fixture(scope="module")
def finished(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    finetune.run(CONFIG, **inputs, out=out, runtime=Runtime())
    return out


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_files_of_a_finished_stage(finished: Path):
    names = set(digests(finished))
    assert names == {
        "adapter.json", "adapter.safetensors", "adapter_ema.safetensors", "curves.csv", "gradients.csv", "summary.json",
        "texture.csv",
        "samples/step-000000.png", "samples/step-000006.png", "samples/step-000012.png",
    }  # fmt: skip
    facts = json.loads((finished / "adapter.json").read_text())
    assert facts["label_map"] == [[0, 0], [1, 1], [2, 2]]
    assert facts["config"]["steps"] == 12


def test_every_term_is_written_for_every_step_and_its_gradient_now_and_then(finished: Path):
    curves, gradients = read_csv(finished / "curves.csv"), read_csv(finished / "gradients.csv")
    assert [int(row["step"]) for row in curves] == list(range(1, 13))
    assert [int(row["step"]) for row in gradients] == [1, 6, 11]
    for row in (*curves, *gradients):
        assert set(row) == {"step", *TERMS}
        assert all(torch.isfinite(torch.tensor(float(cell))) for cell in row.values())
    assert float(curves[0]["d"]) == 0.0  # memories are empty at first
    assert float(curves[-1]["r"]) > 0
    assert all(float(gradients[-1][term]) > 0 for term in ("simple", "vb", "r", "d"))


@pytest.mark.parametrize(("title", "amount"), [("Fine-tuning", 2), ("Fine-tuning", 10)])
def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(
    inputs: dict[str, Path], finished: Path, tmp_path: Path, title: str, amount: int
):
    with pytest.raises(Killed):
        finetune.run(CONFIG, **inputs, out=tmp_path, runtime=killing_after(title, amount))
    finetune.run(CONFIG, **inputs, out=tmp_path, runtime=Runtime())
    assert digests(tmp_path) == digests(finished)


def test_a_resumed_run_does_not_start_again(inputs: dict[str, Path], tmp_path: Path):
    with pytest.raises(Killed):
        finetune.run(CONFIG, **inputs, out=tmp_path, runtime=killing_after("Fine-tuning", 10))
    started_at: list[int] = []

    @contextmanager
    def progress(name: str, *, total: int, unit: str = "items", done: int = 0) -> Iterator[Bar]:
        started_at.append(done)
        with Runtime().progress(name, total=total) as bar:
            yield bar

    finetune.run(CONFIG, **inputs, out=tmp_path, runtime=Runtime(progress=progress))
    assert started_at == [8]


def test_training_changes_the_rows_and_lowers_the_loss_on_a_fixed_batch(inputs: dict[str, Path], tmp_path: Path):
    base, data = prepared(inputs)
    config = CONFIG.model_copy(update={"steps": 60, "precision": "fp32", "norm_every": 1000})
    state = FinetuneTrainer(base, config, {0: 0, 1: 1, 2: 2})
    batch = draw(data, step=10_000, size=24)

    def simple() -> float:
        with torch.no_grad():
            return float(terms_of(state, batch)["simple"])

    before = simple()
    for _ in range(60):
        state.advance(data)
    assert simple() < 0.9 * before


def test_averaged_and_last_weights_differ_and_lie_on_the_adapters_base(finished: Path, inputs: dict[str, Path]):
    raw, ema = load_adapter(finished, "raw"), load_adapter(finished, "ema")
    assert not torch.equal(raw.tensors[ROWS], ema.tensors[ROWS])
    base = load_base(str(inputs["base"]))
    raw.apply(base.dit, base.digest)


def prepared(inputs: dict[str, Path]) -> tuple[Base, TrainingSet]:
    label_map = {0: 0, 1: 1, 2: 2}
    return load_base(str(inputs["base"])), load_training_set(inputs["latents"], inputs["clusters"], label_map)


def terms_of(state: FinetuneTrainer, batch: Batch) -> dict[str, torch.Tensor]:
    return state.loss.terms(whole(batch), state.memories, SingleProcess())[0]


def whole(batch: Batch) -> Part:
    """The batch as the only part of a step."""
    (part,) = parts_of(batch, torch.device("cpu"), rank=0, processes=1, accumulate=1)
    return part


def draw(data: TrainingSet, *, step: int = 0, size: int = 6, label_dropout: float = 0.1, flip: bool = True) -> Batch:
    return draw_batch(data, step=step, size=size, null_row=SHAPE.null_row, label_dropout=label_dropout, flip=flip, seed=0)


@pytest.mark.parametrize("term", ["simple", "sr"])
def test_a_loss_that_is_not_finite_names_its_term_and_step_and_keeps_a_checkpoint(
    inputs: dict[str, Path], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, term: str
):
    original = FinetuneLoss.terms

    def broken(self, *args, **named):  # type: ignore[no-untyped-def]
        terms, x0_hat = original(self, *args, **named)
        return ({**terms, term: terms[term] * float("nan")} if broken.step == 6 else terms), x0_hat

    advance = FinetuneTrainer.advance

    def counted(self: FinetuneTrainer, data: TrainingSet) -> dict[str, float]:
        broken.step = self.step  # type: ignore[attr-defined]
        return advance(self, data)

    monkeypatch.setattr(FinetuneLoss, "terms", broken)
    monkeypatch.setattr(FinetuneTrainer, "advance", counted)
    with pytest.raises(TrainingError, match=rf"'{term}' is nan at step 6"):
        finetune.run(CONFIG, **inputs, out=tmp_path, runtime=Runtime())
    monkeypatch.undo()
    finetune.run(CONFIG, **inputs, out=tmp_path, runtime=Runtime())
    assert digests(tmp_path) == digests(finished)


def test_a_gradient_that_is_not_finite_is_found_before_it_reaches_the_weights(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, data = prepared(inputs)
    state = FinetuneTrainer(base, CONFIG.model_copy(update={"norm_every": 1000}), {0: 0, 1: 1, 2: 2})
    state.step = 1
    original = FinetuneLoss.terms

    def broken(*args, **named):  # type: ignore[no-untyped-def]
        terms, x0_hat = original(*args, **named)
        return {**terms, "vb": terms["vb"] + (terms["vb"] - terms["vb"].detach()).abs().sqrt()}, x0_hat

    monkeypatch.setattr(FinetuneLoss, "terms", broken)
    before = {name: p.detach().clone() for name, p in state.trainable.items()}
    with pytest.raises(TrainingError, match="gradient of the loss term 'vb'"):
        state.advance(data)
    assert all(torch.equal(p, before[name]) for name, p in state.trainable.items())


def test_labels_are_dropped_once_a_sample_and_stay_known_to_the_memories(inputs: dict[str, Path], tmp_path: Path):
    _, data = prepared(inputs)
    batch = draw(data, size=4000, label_dropout=0.25)
    dropped = batch.y == SHAPE.null_row
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(batch.y[~dropped], batch.labels[~dropped])
    assert batch.labels.max() == 2
    assert not (draw(data, size=500, label_dropout=0.0).y == SHAPE.null_row).any()


def test_both_flips_are_encoded_and_drawn(inputs: dict[str, Path], tmp_path: Path):
    _, data = prepared(inputs)
    mean = torch.from_numpy(data.latents.mean[:].copy())
    assert mean.shape == (2, 24, 4, 4, 4)
    assert not torch.equal(mean[0], mean[1])
    chosen = patches_of_step(24, 0, 24, 0)

    def mirrored(flip: bool) -> list[bool]:
        return [
            bool(torch.equal(x, mean[1, i].float())) for x, i in zip(draw(data, size=24, flip=flip).x0, chosen, strict=True)
        ]

    assert 4 < sum(mirrored(True)) < 20
    assert not any(mirrored(False))


@pytest.mark.parametrize(("count", "size"), [(10, 4), (3, 8), (7, 7)])
def test_every_patch_comes_once_an_epoch(count: int, size: int):
    steps = 3 * count  # size whole epochs of it, three times
    drawn = torch.cat([patches_of_step(count, step, size, seed=1) for step in range(steps)])
    epochs = drawn.reshape(-1, count)
    assert all(epoch.sort().values.tolist() == list(range(count)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1]) or count < 4


def test_minimax_sees_the_proper_x0_or_the_papers_difference(inputs: dict[str, Path], tmp_path: Path):
    base, data = prepared(inputs)
    batch = draw(data)
    state = FinetuneTrainer(base, CONFIG.model_copy(update={"precision": "fp32"}), {0: 0, 1: 1, 2: 2})
    predictions = {}
    for kind in ("x0", "difference"):
        step = FinetuneLoss(base, CONFIG.model_copy(update={"x0_hat": kind, "precision": "fp32"}))
        _, predictions[kind] = step.terms(whole(batch), state.memories, SingleProcess())
    sqrt_abar = state.loss.schedule.sqrt_alpha_bar[batch.t][:, None, None, None]
    noise_part = state.loss.schedule.sqrt_one_minus_alpha_bar[batch.t][:, None, None, None]
    x_t = sqrt_abar * batch.x0 + noise_part * batch.noise
    eps = x_t - predictions["difference"]
    torch.testing.assert_close(predictions["x0"] * sqrt_abar, x_t - noise_part * eps, rtol=1e-3, atol=1e-3)
    assert not predictions["x0"].requires_grad


def test_latents_of_another_shape_are_refused(inputs: dict[str, Path], tmp_path: Path):
    wrong = tmp_path / "latents"
    shutil.copytree(inputs["latents"], wrong)
    np.save(wrong / "mean.npy", np.zeros((2, 24, 4, 8, 8), np.float16))
    with pytest.raises(InputError, match="do not fit a DiT"):
        finetune.run(CONFIG, **{**inputs, "latents": wrong}, out=tmp_path, runtime=Runtime())


def test_clusters_of_other_patches_are_refused(inputs: dict[str, Path], tmp_path: Path):
    fewer = write_clusters(tmp_path / "clusters", count=6)
    with pytest.raises(InputError, match="no pseudo-label"):
        finetune.run(CONFIG, **{**inputs, "clusters": fewer}, out=tmp_path, runtime=Runtime())


def test_more_pseudo_labels_than_class_rows_are_refused(inputs: dict[str, Path], tmp_path: Path):
    many = write_clusters(tmp_path / "clusters", k=13)
    with pytest.raises(InputError, match="13 pseudo-labels do not fit"):
        finetune.run(CONFIG, **{**inputs, "clusters": many}, out=tmp_path, runtime=Runtime())


def test_a_config_does_not_cost_an_import_of_torch():
    code = "import sys, ddsr_core.diffusion.config, ddsr_core.sampling.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def test_no_steps_leave_the_base_as_it_is(inputs: dict[str, Path], tmp_path: Path):
    config = CONFIG.model_copy(update={"steps": 0, "class_row_init": "imagenet_rows"})
    finetune.run(config, **inputs, out=tmp_path, runtime=Runtime())
    base = load_base(str(inputs["base"]))
    before = {name: value.clone() for name, value in base.dit.state_dict().items()}
    load_adapter(tmp_path).apply(base.dit, base.digest)
    after = base.dit.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(bool((after[name] == 1).all()) for name in after.keys() - before.keys())


def test_the_budget_is_steps_or_epochs():
    assert FinetuneConfig(batch_size=8).total_steps(1000) == 8750
    assert FinetuneConfig(batch_size=4, epochs=1).total_steps(9) == 3
    assert CONFIG.total_steps(1000) == 12
    with pytest.raises(ValueError, match="either steps or epochs"):
        FinetuneConfig(steps=3)


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(inputs: dict[str, Path]):
    rows = {}
    for parts in (1, 3):
        base, data = prepared(inputs)
        plain = {"lambda_r": 0.0, "lambda_d": 0.0, "precision": "fp32", "accumulate": parts}
        state = FinetuneTrainer(base, CONFIG.model_copy(update=plain), {0: 0, 1: 1, 2: 2})
        rows[parts] = [state.advance(data) for _ in range(5)]
    for whole, split in zip(rows[1], rows[3], strict=True):
        assert split == pytest.approx(whole, rel=2e-3, abs=1e-6)


def test_accumulation_remembers_the_batch_in_its_order(inputs: dict[str, Path]):
    queues = []
    for parts in (1, 3):
        base, data = prepared(inputs)
        state = FinetuneTrainer(
            base, CONFIG.model_copy(update={"accumulate": parts, "precision": "fp32"}), {0: 0, 1: 1, 2: 2}
        )
        state.advance(data)
        queues.append((state.memories.real.queues, state.memories.predicted.queues))
    for whole, split in zip(*queues, strict=True):
        for label in whole:
            torch.testing.assert_close(split[label], whole[label], rtol=1e-4, atol=1e-4)


def test_recomputing_blocks_changes_nothing(inputs: dict[str, Path]):
    rows = []
    for checkpointing in ("off", "on"):
        base, data = prepared(inputs)
        state = FinetuneTrainer(base, CONFIG.model_copy(update={"checkpointing": checkpointing}), {0: 0, 1: 1, 2: 2})
        assert base.dit.checkpoint_blocks == (checkpointing == "on")
        rows.append([state.advance(data) for _ in range(3)])
    assert rows[0] == rows[1]


def test_blocks_are_recomputed_where_they_would_not_fit():
    full, shape = FinetuneConfig(batch_size=8), DIT_XL_2_512
    assert activation_bytes(full, shape) == pytest.approx(8 * 0.99 * 2**30, rel=0.02)  # as measured on DiT-XL/2
    assert activation_bytes(FinetuneConfig(batch_size=8, accumulate=4), shape) * 4 == activation_bytes(full, shape)
    assert not wants_checkpointing(full, shape, torch.device("cpu"))
    assert wants_checkpointing(FinetuneConfig(checkpointing="on"), shape, torch.device("cpu"))


def test_two_processes_walk_the_path_of_one(inputs: dict[str, Path], tmp_path: Path):
    curves = []
    for processes in (1, 2):
        config = CONFIG.model_copy(update={"processes": processes, "precision": "fp32", "norm_every": 3})
        out = tmp_path / str(processes)
        finetune.run(config, **inputs, out=out, runtime=Runtime())
        curves.append((read_csv(out / "curves.csv"), read_csv(out / "gradients.csv")))
    for alone, together in zip(*curves, strict=True):
        assert len(alone) == len(together)
        for a, b in zip(alone, together, strict=True):
            assert {k: float(v) for k, v in b.items()} == pytest.approx(
                {k: float(v) for k, v in a.items()}, rel=5e-3, abs=1e-6
            )


def test_an_error_in_one_process_is_the_stages_error(inputs: dict[str, Path], tmp_path: Path):
    many = write_clusters(tmp_path / "clusters", k=13)
    config = CONFIG.model_copy(update={"processes": 2})
    with pytest.raises(InputError, match="13 pseudo-labels do not fit"):
        finetune.run(config, **{**inputs, "clusters": many}, out=tmp_path / "out", runtime=Runtime())


def test_rows_start_where_they_are_told(inputs: dict[str, Path]):
    def rows(start: str, nearest: dict[int, list[int]] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        base, _ = prepared(inputs)
        table = base.dit.y_embedder.embedding_table.weight
        before = table.detach().clone()
        FinetuneTrainer(base, CONFIG.model_copy(update={"class_row_init": start}), {0: 0, 1: 1, 2: 2}, rows=nearest)
        return before, table.detach()

    before, after = rows("imagenet_rows")
    assert torch.equal(before, after)
    before, after = rows("null")
    assert torch.equal(after[:3], before[SHAPE.null_row].expand(3, -1))
    before, after = rows("clip_nearest", {0: [1, 2], 1: [0], 2: [5]})
    torch.testing.assert_close(after[:3], torch.stack([before[[1, 2]].mean(0), before[0], before[5]]))
    assert torch.equal(after[3:], before[3:])
    with pytest.raises(InputError, match="no nearest classes for pseudo-label 2"):
        rows("clip_nearest", {0: [1], 1: [1]})


def test_lsr_looks_at_a_crop_and_at_what_the_decoder_can_show(inputs: dict[str, Path]):
    base, data = prepared(inputs)
    batch = draw(data, size=24)
    batch = replace(batch, t=torch.full_like(batch.t, 50))
    values = {}
    for name, change in {"whole": {}, "crop": {"lsr_crop_px": 2}, "patch": {"lsr_reference": "patch"}}.items():
        base, data = prepared(inputs)
        config = CONFIG.model_copy(update={"precision": "fp32", **change})
        values[name] = float(terms_of(FinetuneTrainer(base, config, {0: 0, 1: 1, 2: 2}), batch)["sr"].detach())
    assert len(set(values.values())) == 3
    assert values["whole"] >= 0


def test_a_crop_cannot_be_held_against_the_whole_patch():
    with pytest.raises(ValueError, match="lsr_reference"):
        FinetuneConfig(lsr_crop_px=32, lsr_reference="patch")


@pytest.mark.parametrize(("samples_db", "share"), [(30.0, 1.0), (25.0, 1.0), (24.25, 0.25), (24.0, 0.0), (21.0, 0.0)])
def test_lsr_weighs_less_the_nearer_samples_are_to_the_patches(inputs: dict[str, Path], samples_db: float, share: float):
    base, data = prepared(inputs)
    batch = replace(draw(data), t=torch.full((6,), 40))
    state = FinetuneTrainer(base, CONFIG.model_copy(update={"precision": "fp32"}), {0: 0, 1: 1, 2: 2})
    full = float(terms_of(state, batch)["sr"].detach())
    state.adapt_lsr(samples_db, real_db=24.0)
    assert full > 0
    assert float(terms_of(state, batch)["sr"].detach()) == pytest.approx(share * full)


def test_what_was_seen_of_the_texture_is_written(finished: Path, inputs: dict[str, Path]):
    rows = read_csv(finished / "texture.csv")
    assert [int(row["step"]) for row in rows] == [0, 3, 6, 9]
    _, data = prepared(inputs)
    expected = np.mean([data.latents.psnr_bic[(data.labels == label).numpy()].mean() for label in range(3)])
    assert all(float(row["real_db"]) == pytest.approx(expected, rel=1e-5) for row in rows)
    assert len({row["samples_db"] for row in rows}) == 4


def test_the_memory_of_predictions_takes_only_what_counts(inputs: dict[str, Path]):
    for last, expected in ((999, 6), (-1, 0)):
        base, data = prepared(inputs)
        config = CONFIG.model_copy(update={"minimax_last_step": last, "memory_size": 64})
        state = FinetuneTrainer(base, config, {0: 0, 1: 1, 2: 2})
        state.advance(data)
        assert sum(map(len, state.memories.predicted.queues.values())) == expected
        assert sum(map(len, state.memories.real.queues.values())) == 6


def test_frozen_matrices_in_bf16_change_no_product(inputs: dict[str, Path]):
    base, data = prepared(inputs)
    batch = draw(data)
    state = FinetuneTrainer(base, CONFIG.model_copy(update={"precision": "fp32"}), {0: 0, 1: 1, 2: 2})
    state.loss.half = True
    before = {name: float(value.detach()) for name, value in terms_of(state, batch).items()}
    keep_frozen_in_bf16(base.dit)
    assert base.dit.layers[0].attn.qkv.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in state.trainable.values())
    assert {name: float(value.detach()) for name, value in terms_of(state, batch).items()} == before
