"""Equation 6 on a batch."""

from dataclasses import replace
from pathlib import Path

import torch

from ddsr_core.diffusion.finetune_loss import FinetuneLoss
from ddsr_core.diffusion.finetune_trainer import FinetuneTrainer
from ddsr_core.distributed import SingleProcess
from tests.helpers.tiny_finetuning import CONFIG, LABEL_MAP, draw, load_inputs, only_part, terms_of


def test_minimax_compares_x0_or_the_difference_that_the_paper_prints(inputs: dict[str, Path], tmp_path: Path):
    base, data = load_inputs(inputs)
    batch = draw(data)
    state = FinetuneTrainer(base, CONFIG.model_copy(update={"precision": "fp32"}), LABEL_MAP)
    predictions = {}
    for kind in ("x0", "difference"):
        step = FinetuneLoss(base, CONFIG.model_copy(update={"x0_hat": kind, "precision": "fp32"}))
        _, predictions[kind] = step.terms(only_part(batch), state.memories, SingleProcess())
    sqrt_abar = state.loss.schedule.sqrt_alpha_bar[batch.t][:, None, None, None]
    noise_part = state.loss.schedule.sqrt_one_minus_alpha_bar[batch.t][:, None, None, None]
    x_t = sqrt_abar * batch.x0 + noise_part * batch.noise
    eps = x_t - predictions["difference"]
    torch.testing.assert_close(predictions["x0"] * sqrt_abar, x_t - noise_part * eps, rtol=1e-3, atol=1e-3)
    assert not predictions["x0"].requires_grad


def test_lsr_uses_a_crop_and_the_decoded_reference(inputs: dict[str, Path]):
    base, data = load_inputs(inputs)
    batch = draw(data, size=24)
    batch = replace(batch, t=torch.full_like(batch.t, 50))
    values = {}
    for name, change in {"whole": {}, "crop": {"lsr_crop_px": 2}, "patch": {"lsr_reference": "patch"}}.items():
        base, data = load_inputs(inputs)
        config = CONFIG.model_copy(update={"precision": "fp32", **change})
        values[name] = float(terms_of(FinetuneTrainer(base, config, LABEL_MAP), batch)["sr"].detach())
    assert len(set(values.values())) == 3
    assert values["whole"] >= 0
