"""A compiled network in the fine-tuning step."""

import copy
from functools import partial

import pytest
import torch

from benchmarks.finetune_step import cached_posteriors, make_base, random_dit, small_vae
from ddsr_core.diffusion.config import FinetuneConfig
from ddsr_core.diffusion.dit import DiTConfig
from ddsr_core.diffusion.finetune_trainer import FinetuneTrainer
from ddsr_core.diffusion.training_set import TrainingSet


@pytest.mark.slow
def test_gradient_norms_between_compiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a resume: a compiled step, one that measures norms, a compiled one; equal to those of a plain run."""
    # The partitioner decides what a backward pass may overwrite; a code generator behind it would only take time.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    torch.manual_seed(0)
    vae, dit = small_vae(), random_dit(DiTConfig(latent_px=4, hidden=16, depth=2, heads=2, classes=8))
    posteriors = cached_posteriors(torch.rand(12, 3, 32, 32) * 2 - 1, vae)
    data = TrainingSet(posteriors, torch.arange(12) % 3, torch.arange(3))
    curves = {}
    for compiled in (True, False):
        config = FinetuneConfig(batch_size=4, lsr_mode="off", precision="fp32", norm_every=2, compile=compiled)
        run = FinetuneTrainer(make_base(copy.deepcopy(dit), vae), config, {0: 0, 1: 1, 2: 2})
        run.step = 1
        curves[compiled] = [run.advance(data) for _ in range(3)]
    assert "grad_simple" in curves[True][1]
    for with_compiler, without in zip(curves[True], curves[False], strict=True):
        assert with_compiler == pytest.approx(without, rel=1e-4, abs=1e-6)
