"""A step of fine-tuning and what is carried from step to step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddsr_core.diffusion.finetune_loss import FinetuneLoss
from ddsr_core.diffusion.finetune_trainer import FinetuneTrainer, keep_frozen_in_bf16
from ddsr_core.errors import InputError, TrainingError
from tests.helpers.tiny_base import SHAPE
from tests.helpers.tiny_finetuning import CONFIG, LABEL_MAP, draw, load_inputs, terms_of


def test_training_changes_the_rows_and_lowers_the_loss_on_a_fixed_batch(inputs: dict[str, Path], tmp_path: Path):
    base, data = load_inputs(inputs)
    config = CONFIG.model_copy(update={"steps": 60, "precision": "fp32", "norm_every": 1000})
    state = FinetuneTrainer(base, config, LABEL_MAP)
    batch = draw(data, step=10_000, size=24)

    def simple() -> float:
        with torch.no_grad():
            return float(terms_of(state, batch)["simple"])

    before = simple()
    for _ in range(60):
        state.advance(data)
    assert simple() < 0.9 * before


def test_a_gradient_that_is_not_finite_is_found_before_it_reaches_the_weights(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, data = load_inputs(inputs)
    state = FinetuneTrainer(base, CONFIG.model_copy(update={"norm_every": 1000}), LABEL_MAP)
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


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(inputs: dict[str, Path]):
    rows = {}
    for parts in (1, 3):
        base, data = load_inputs(inputs)
        plain = {"lambda_r": 0.0, "lambda_d": 0.0, "precision": "fp32", "accumulate": parts}
        state = FinetuneTrainer(base, CONFIG.model_copy(update=plain), LABEL_MAP)
        rows[parts] = [state.advance(data) for _ in range(5)]
    for whole, split in zip(rows[1], rows[3], strict=True):
        assert split == pytest.approx(whole, rel=2e-3, abs=1e-6)


def test_accumulation_stores_the_batch_in_its_order(inputs: dict[str, Path]):
    queues = []
    for parts in (1, 3):
        base, data = load_inputs(inputs)
        state = FinetuneTrainer(base, CONFIG.model_copy(update={"accumulate": parts, "precision": "fp32"}), LABEL_MAP)
        state.advance(data)
        queues.append((state.memories.real.queues, state.memories.predicted.queues))
    for whole, split in zip(*queues, strict=True):
        for label in whole:
            torch.testing.assert_close(split[label], whole[label], rtol=1e-4, atol=1e-4)


def test_recomputing_changes_nothing(inputs: dict[str, Path]):
    rows = []
    for checkpointing in ("off", "decoder", "on"):
        base, data = load_inputs(inputs)
        config = CONFIG.model_copy(update={"checkpointing": checkpointing, "precision": "fp32"})
        state = FinetuneTrainer(base, config, LABEL_MAP)
        assert base.dit.checkpoint_blocks == (checkpointing == "on")
        assert state.loss.slice_decoder == (checkpointing != "off")
        rows.append([state.advance(data) for _ in range(3)])
    assert any(row["sr"] > 0 for row in rows[0])
    for other in rows[1:]:
        for row, expected in zip(other, rows[0], strict=True):
            assert row == pytest.approx(expected, rel=1e-4, abs=1e-7)  # an image alone rounds differently than in a batch


def test_class_rows_are_initialized_as_configured(inputs: dict[str, Path]):
    def rows(start: str, nearest: dict[int, dict[int, float]] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        base, _ = load_inputs(inputs)
        table = base.dit.y_embedder.embedding_table.weight
        before = table.detach().clone()
        FinetuneTrainer(base, CONFIG.model_copy(update={"class_row_init": start}), LABEL_MAP, rows=nearest)
        return before, table.detach()

    before, after = rows("imagenet_rows")
    assert torch.equal(before, after)
    before, after = rows("null")
    assert torch.equal(after[:3], before[SHAPE.null_row].expand(3, -1))
    before, after = rows("auto")
    assert torch.equal(after[:3], before[SHAPE.null_row].expand(3, -1))
    for init in ("auto", "nearest_classes", "clip_nearest"):
        before, after = rows(init, {0: {1: 0.75, 2: 0.25}, 1: {0: 1.0}, 2: {5: 1.0}})
        expected = torch.stack([0.75 * before[1] + 0.25 * before[2], before[0], before[5]])
        torch.testing.assert_close(after[:3], expected)
        assert torch.equal(after[3:], before[3:])
    with pytest.raises(InputError, match="no nearest classes for pseudo-label 2"):
        rows("clip_nearest", {0: {1: 1.0}, 1: {1: 1.0}})
    with pytest.raises(InputError, match="no nearest classes for pseudo-label 0"):
        rows("nearest_classes")


@pytest.mark.parametrize(("samples_db", "share"), [(30.0, 1.0), (25.0, 1.0), (24.25, 0.25), (24.0, 0.0), (21.0, 0.0)])
def test_lsr_has_less_weight_the_closer_samples_are_to_the_patches(inputs: dict[str, Path], samples_db: float, share: float):
    base, data = load_inputs(inputs)
    batch = replace(draw(data), t=torch.full((6,), 40))
    state = FinetuneTrainer(base, CONFIG.model_copy(update={"precision": "fp32"}), LABEL_MAP)
    full = float(terms_of(state, batch)["sr"].detach())
    state.adapt_lsr(samples_db, real_db=24.0)
    assert full > 0
    assert float(terms_of(state, batch)["sr"].detach()) == pytest.approx(share * full)


def test_the_memory_of_predictions_takes_only_samples_below_the_last_step(inputs: dict[str, Path]):
    for last, expected in ((999, 6), (-1, 0)):
        base, data = load_inputs(inputs)
        config = CONFIG.model_copy(update={"minimax_last_step": last, "memory_size": 64})
        state = FinetuneTrainer(base, config, LABEL_MAP)
        state.advance(data)
        assert sum(map(len, state.memories.predicted.queues.values())) == expected
        assert sum(map(len, state.memories.real.queues.values())) == 6


def test_frozen_matrices_in_bf16_change_no_product(inputs: dict[str, Path]):
    base, data = load_inputs(inputs)
    batch = draw(data)
    state = FinetuneTrainer(base, CONFIG.model_copy(update={"precision": "fp32"}), LABEL_MAP)
    state.loss.half = True
    before = {name: float(value.detach()) for name, value in terms_of(state, batch).items()}
    keep_frozen_in_bf16(base.dit)
    assert base.dit.layers[0].attn.qkv.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in state.trainable.values())
    assert {name: float(value.detach()) for name, value in terms_of(state, batch).items()} == before
