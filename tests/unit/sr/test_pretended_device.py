"""SR training on a pretended CUDA device: no tensor left on the CPU, no wait within a step, the numbers of the CPU."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from ddsr_core.config import Runtime
from ddsr_core.imaging.images import save_png
from ddsr_core.sr import perceptual, train_sr
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.recipes import GAN_RECIPES
from tests.helpers.interruption import digests
from tests.helpers.pretended_device import FREE_BYTES, pretended_cuda
from tests.unit.sr.test_gan import config_of, random_trunk

EDSR = TrainSRConfig(
    arch="edsr-small", arch_kwargs={"feat": 8, "blocks": 1}, iterations=6, batch_size=2, lr_patch_px=8, checkpoint_every=3,
    precision="fp32",
)  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for index in range(2):
        save_png(tmp_path / f"data/{index}.png", generator.integers(0, 256, (128, 132, 3), np.uint8))
    return tmp_path / "data"


@pytest.fixture
def trunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A VGG19 with random weights and four channels."""
    monkeypatch.setattr(perceptual, "WIDTHS", (4,) * 5)
    save_file(random_trunk("vgg19"), tmp_path / "trunk.safetensors")
    return tmp_path / "trunk.safetensors"


def same_on_both(config: TrainSRConfig, data: Path, out: Path, trunk: Path | None = None) -> None:
    train_sr.run(config, data=data, out=out / "cpu", runtime=Runtime(), trunk=trunk)
    with pretended_cuda():
        train_sr.run(config, data=data, out=out / "cuda", runtime=Runtime(device="cuda"), trunk=trunk)
    assert digests(out / "cuda") == digests(out / "cpu")


@pytest.mark.parametrize("free", [FREE_BYTES, 0], ids=["pixels on the device", "pixels on the host"])
def test_training_on_l1_gives_the_bytes_of_the_cpu(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int):
    monkeypatch.setattr("tests.helpers.pretended_device.FREE_BYTES", free)
    same_on_both(EDSR, data, tmp_path)


@pytest.mark.parametrize("arch", ["srformer-small", "rrdbnet"])
def test_other_networks_give_the_bytes_of_the_cpu(data: Path, tmp_path: Path, arch: str):
    kwargs = {"rrdbnet": {"feat": 8, "blocks": 1, "grow": 4}}.get(arch, {})
    config = EDSR.model_copy(update={"arch": arch, "arch_kwargs": kwargs, "iterations": 2, "lr_patch_px": 16})
    same_on_both(config, data, tmp_path)


@pytest.mark.parametrize("recipe", sorted(GAN_RECIPES))
def test_training_against_a_discriminator_gives_the_bytes_of_the_cpu(data: Path, tmp_path: Path, trunk: Path, recipe: str):
    same_on_both(config_of(recipe, precision="fp32"), data, tmp_path, trunk)


@pytest.mark.parametrize("recipe", [None, *sorted(GAN_RECIPES)])
def test_a_step_waits_for_nothing(data: Path, tmp_path: Path, trunk: Path, recipe: str | None):
    config = config_of(recipe, precision="bf16") if recipe else EDSR
    step, places = train_sr.train_step, []
    with pretended_cuda() as gpu:

        def watched(*args):  # type: ignore[no-untyped-def]
            gpu.clear()
            result = step(*args)
            places.extend(gpu.syncs)
            return result

        with pytest.MonkeyPatch.context() as during:
            during.setattr(train_sr, "train_step", watched)
            train_sr.run(config, data=data, out=tmp_path, runtime=Runtime(device="cuda"), trunk=trunk if recipe else None)
    assert places == []
