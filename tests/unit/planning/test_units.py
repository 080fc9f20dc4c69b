"""Units of work against the real thing on real tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddsr_core.diffusion.base import load_base
from ddsr_core.diffusion.config import FinetuneConfig
from ddsr_core.diffusion.finetune_trainer import FinetuneTrainer
from ddsr_core.errors import ConfigError
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.evaluation.evaluator import Evaluator
from ddsr_core.planning import shapes, units
from ddsr_core.pseudo_labels.config import EmbeddingsConfig
from ddsr_core.pseudo_labels.embedders import load_embedder
from ddsr_core.pseudo_labels.names import EMBEDDERS, Embedder
from ddsr_core.sampling.config import SampleConfig
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.networks import build_network
from ddsr_core.sr.state import new_state
from ddsr_core.sr.train_sr import train_step

TINY = shapes.base_shape("ddsr-tiny", None)


def real_flops(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("arch", ["edsr-small", "srformer-small"])
def test_a_training_step_of_an_sr_network_has_the_flops_of_a_real_one(arch):
    config = TrainSRConfig(arch=arch, iterations=1, batch_size=2, lr_patch_px=16)
    state = new_state(config, "cpu")
    real = real_flops(lambda: train_step(config, state, torch.rand(2, 3, 16, 16), torch.rand(2, 3, 64, 64), bf16=False))
    assert units.train_sr(config, "cpu").first.flops == real


def test_embeddings_have_the_flops_of_real_ones():
    config = EmbeddingsConfig(backend="vgg16", image_px=64)
    embedder = load_embedder(config)
    with torch.inference_mode():
        real = real_flops(lambda: embedder(torch.rand(3, 3, 64, 64)))
    assert units.embed(config, 64, 3).flops == real


def linear(config: EmbeddingsConfig, weights: Path | None) -> nn.Module:
    """An embedder that is not ours."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))


def test_an_embedder_of_others_is_counted_as_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(EMBEDDERS, "linear", Embedder(f"{__name__}:linear"))
    assert units.embed(EmbeddingsConfig(backend="linear"), 8, 5).flops == 2 * 5 * (3 * 8 * 8) * 10


def test_sampling_has_the_flops_of_the_real_base():
    base = load_base("ddsr-tiny")
    assert TINY.image_px == base.image_px
    latents, t, rows = torch.randn(2, 4, 16, 16), torch.zeros(2), torch.zeros(2, dtype=torch.long)
    with torch.inference_mode():
        forward = real_flops(lambda: base.dit(latents, t, rows))
        decode = real_flops(lambda: base.decode(latents[:1]))
        encode = real_flops(lambda: base.encode(torch.rand(2, 3, 64, 64)))
    plain = units.sample(SampleConfig(guidance_scale=2.0), TINY, 2)
    assert (plain.plain.flops, plain.guided.flops, plain.decode.flops) == (forward, 2 * forward, decode)
    assert units.encode(TINY, 64, 2).flops >= 2 * encode


def test_a_step_of_fine_tuning_has_the_flops_of_a_real_one():
    config = FinetuneConfig(steps=1, epochs=None, batch_size=2, lsr_mode="off", gamma_blocks=2, precision="fp32")
    base = load_base("ddsr-tiny")
    trainer = FinetuneTrainer(base, config, {label: label for label in range(3)})
    batch = units._batch(TINY, 2)
    trainer._draw = lambda data: batch  # type: ignore[method-assign]
    trainer.step = 1  # no gradient norms
    real = real_flops(lambda: trainer.advance(None))  # type: ignore[arg-type]
    planned = units.finetune(units.FinetuneJob(config, TINY, None, 3, 1, 2))
    assert planned.step.flops == pytest.approx(real, rel=0.02)
    assert planned.measured.flops > 2 * planned.step.flops
    assert planned.step.peak_bytes > 4 * planned.trained


def test_an_evaluation_has_the_flops_of_a_real_one():
    config, recipe = EvaluateConfig(), TrainSRConfig(arch="edsr-small")
    evaluator = Evaluator(build_network("edsr-small").eval(), config, "cpu")
    pixels = np.zeros((64, 80, 3), np.uint8)
    real = real_flops(lambda: evaluator.score(evaluator.enlarge("", pixels)))
    assert units.evaluate(config, recipe, (64, 80), again=False).flops == pytest.approx(real, rel=0.01)
    assert units.evaluate(config, recipe, (64, 80), again=True).flops < real


def test_published_models_are_known_without_their_files():
    shape = shapes.base_shape("facebook/DiT-XL-2-512", "stabilityai/sd-vae-ft-mse")
    assert (shape.image_px, shape.dit.hidden, shape.vae["_class_name"]) == (512, 1152, "AutoencoderKL")
    with pytest.raises(ConfigError, match="shape of 'somebody/model' is not known"):
        shapes.base_shape("somebody/model", None)
