"""Latents, fine-tuning and samplers on a pretended CUDA device: no tensor left on the CPU, no wait within a step."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddsr_core.config import Runtime
from ddsr_core.diffusion import finetune, latents
from ddsr_core.diffusion.config import FinetuneConfig, LatentsConfig
from ddsr_core.diffusion.finetune_trainer import FinetuneTrainer
from ddsr_core.diffusion.samplers import sample_latents
from tests.helpers.interruption import Killed, digests, killing_after
from tests.helpers.pretended_device import pretended_cuda
from tests.helpers.published_models import small_taesd, write_diffusers
from tests.helpers.tiny_base import IMAGE_PX, tiny_dit, write_base, write_clusters, write_patches
from tests.helpers.tiny_finetuning import CONFIG, LABEL_MAP, load_inputs

#: Everything that a step can do, one variant each.
VARIANTS: Mapping[str, dict[str, object]] = {
    "target": {},
    "pixels on a crop": {"lsr_mode": "pixels", "lsr_crop_px": 2, "x0_hat": "difference", "minimax_last_step": 999},
    "against the patch": {"lsr_reference": "patch"},
    "in parts": {"accumulate": 2},
    "recomputed": {"checkpointing": "on"},
    "bf16": {"precision": "bf16"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_fine_tuning_gives_the_bytes_of_the_cpu(inputs: dict[str, Path], tmp_path: Path, variant: str):
    config = CONFIG.model_copy(update={"precision": "fp32", "steps": 4, "norm_every": 2, **VARIANTS[variant]})
    finetune.run(config, **inputs, out=tmp_path / "cpu", runtime=Runtime())
    with pretended_cuda():
        finetune.run(config, **inputs, out=tmp_path / "cuda", runtime=Runtime(device="cuda"))
    assert digests(tmp_path / "cuda") == digests(tmp_path / "cpu")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_waits_once_for_the_device(inputs: dict[str, Path], variant: str):
    config = CONFIG.model_copy(update={"precision": "fp32", **VARIANTS[variant]})
    with pretended_cuda() as gpu:
        base, data = load_inputs(inputs, "cuda")
        trainer = FinetuneTrainer(base, config, LABEL_MAP)
        for _ in range(3):
            trainer.advance(data)  # the first step measures gradient norms
            assert gpu.places[-1] == "finetune_trainer.py:_finite_values"
            gpu.clear()
            trainer.advance(data)
            assert gpu.places == ["finetune_trainer.py:_finite_values"]


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_latents_give_the_bytes_of_the_cpu(tmp_path: Path, kind: str):
    side = {"tiny": IMAGE_PX, "kl": 64}[kind]
    base = write_base(tmp_path / "base") if kind == "tiny" else write_diffusers(tmp_path / "base")
    patches = write_patches(tmp_path / "patches", count=6, side=side)
    config = LatentsConfig(batch_size=4)
    latents.run(config, patches=patches, base=base, out=tmp_path / "cpu", runtime=Runtime())
    with pretended_cuda() as gpu:
        latents.run(config, patches=patches, base=base, out=tmp_path / "cuda", runtime=Runtime(device="cuda"))
        assert {place.partition(":")[0] for place in gpu.places} == {"base.py", "latents.py"}
    assert digests(tmp_path / "cuda") == digests(tmp_path / "cpu")


def test_fine_tuning_of_a_published_model_with_a_small_decoder(tmp_path: Path):
    """Diffusers' layout, a KL VAE, L_SR through a TAESD."""
    patches, base = write_patches(tmp_path / "patches", count=6, side=64), write_diffusers(tmp_path / "base")
    small_taesd().save_pretrained(tmp_path / "taesd")
    clusters = write_clusters(tmp_path / "clusters", count=6)
    encoded = tmp_path / "latents"
    encoded.mkdir()
    latents.run(LatentsConfig(), patches=patches, base=base, out=encoded, runtime=Runtime())
    given = {"latents": encoded, "clusters": clusters, "base": base, "decoder": tmp_path / "taesd"}
    config = FinetuneConfig(steps=2, epochs=None, batch_size=4, gamma_blocks=2, precision="fp32", sample_every=None)
    finetune.run(config, **given, out=tmp_path / "cpu", runtime=Runtime())
    with pretended_cuda():
        finetune.run(config, **given, out=tmp_path / "cuda", runtime=Runtime(device="cuda"))
    assert digests(tmp_path / "cuda") == digests(tmp_path / "cpu")


def test_fine_tuning_resumes_on_the_device(inputs: dict[str, Path], tmp_path: Path):
    with pretended_cuda():
        finetune.run(CONFIG, **inputs, out=tmp_path / "whole", runtime=Runtime(device="cuda"))
        with pytest.raises(Killed):
            finetune.run(
                CONFIG, **inputs, out=tmp_path / "cut", runtime=replace(killing_after("Fine-tuning", 6), device="cuda")
            )
        finetune.run(CONFIG, **inputs, out=tmp_path / "cut", runtime=Runtime(device="cuda"))
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


@pytest.mark.parametrize("sampler", ["ancestral", "dpmpp"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_no_step_of_sampling_waits(sampler: str, strength: float):
    def sample(device: str, steps: int) -> torch.Tensor:
        rows = torch.tensor([0, 1], device=device)
        init = None if strength == 1 else torch.full((2, 4, 4, 4), 0.3, device=device)
        return sample_latents(
            tiny_dit().to(device), rows, [0, 1], seed=0, sampler=sampler, steps=steps, guidance_scale=2.0,
            guidance_interval=(100, 900), init=init, strength=strength,
        )  # fmt: skip

    waits = []
    for steps in (5, 9):
        with pretended_cuda() as gpu:
            result = sample("cuda", steps)
            waits.append(len(gpu.syncs))  # of the model's and the rows' way to the device, and of the start
            assert torch.equal(result.cpu(), sample("cpu", steps))
    assert waits[0] == waits[1]
