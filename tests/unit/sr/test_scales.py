"""Networks, pairs and training at x2 and x3."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from spandrel import ModelLoader

from ddsr_core.config import Runtime
from ddsr_core.errors import ConfigError
from ddsr_core.imaging.bicubic import make_lr
from ddsr_core.imaging.images import save_png, to_float, to_uint8
from ddsr_core.sr.architectures import ARCHITECTURES, find_architecture
from ddsr_core.sr.basicsr_compat import import_basicsr
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.data import pack_pairs
from ddsr_core.sr.networks import build_network, recognize
from ddsr_core.sr.train_sr import run
from ddsr_core.sr.weights import load_network, save_weights

KWARGS = {
    "edsr-small": {"feat": 8, "blocks": 1},
    "rcan-small": {"feat": 16, "groups": 1, "blocks": 1, "reduction": 4},
    "rrdbnet-small": {"feat": 8, "blocks": 1, "grow": 32},
    "srformer-small": {"embed": 8, "depths": [1], "heads": [2], "window": 8},
    "hit-srf-small": {"embed": 40, "heads": [2], "window_px": [4, 8]},
}
SCALES = [(arch, scale) for arch in KWARGS for scale in (2, 3) if (arch, scale) != ("rrdbnet-small", 3)]


@pytest.mark.parametrize(("arch", "scale"), SCALES)
def test_networks_of_other_scales_are_written_read_and_recognized(arch: str, scale: int, tmp_path: Path):
    kwargs = find_architecture(arch).arguments(scale, KWARGS[arch])
    network = build_network(arch, kwargs).eval()
    lr = torch.rand(1, 3, 9, 7)
    with torch.no_grad():
        sr = network(lr)
        assert sr.shape == (1, 3, 9 * scale, 7 * scale)
        save_weights(tmp_path, network, arch, kwargs, scale, {})
        loaded = load_network(tmp_path)
        assert (loaded.scale, loaded.name) == (scale, arch)
        assert torch.equal(loaded.module(lr), sr)
        torch.save(network.state_dict(), tmp_path / "bare.pth")
        bare = load_network(tmp_path / "bare.pth")
        assert bare.scale == scale
        assert torch.equal(bare.module(lr), sr)


@pytest.mark.parametrize(("arch", "scale"), [("rcan-small", 2), ("rcan-small", 3), ("rrdbnet-small", 2)])
def test_spandrel_opens_networks_of_other_scales(arch: str, scale: int, tmp_path: Path):
    kwargs = find_architecture(arch).arguments(scale, KWARGS[arch])
    network = build_network(arch, kwargs).eval()
    save_weights(tmp_path, network, arch, kwargs, scale, {})
    theirs = ModelLoader("cpu").load_from_file(tmp_path / "weights.pth")
    lr = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert theirs.scale == scale
        torch.testing.assert_close(theirs(lr.clone()), network(lr).clamp(0, 1), rtol=0, atol=1e-5)


def test_the_generator_at_x2_is_basicsrs():
    torch.manual_seed(0)
    ours = build_network("rrdbnet-small", {**KWARGS["rrdbnet-small"], "scale": 2})
    theirs = import_basicsr("archs.rrdbnet_arch").RRDBNet(3, 3, scale=2, num_feat=8, num_block=1, num_grow_ch=32)
    theirs.load_state_dict(ours.state_dict())
    lr = torch.rand(1, 3, 10, 8)
    torch.testing.assert_close(ours(lr), theirs(lr), rtol=0, atol=1e-6)
    assert recognize(theirs.state_dict()) == ("rrdbnet-small", {"feat": 8, "blocks": 1, "grow": 32, "scale": 2})
    assert ours(lr[..., :9, :7]).shape == (1, 3, 18, 14)


def test_arguments_at_x4_stay_as_they_were():
    for name, architecture in ARCHITECTURES.items():
        assert architecture.arguments(4, {}) == architecture.kwargs, name
    assert find_architecture("some.module:Net").arguments(2, {"a": 1}) == {"a": 1}


@pytest.mark.parametrize("scale", [2, 3])
def test_pairs_of_other_scales(scale: int, tmp_path: Path):
    image = np.random.default_rng(0).integers(0, 256, (32, 41, 3), np.uint8)
    save_png(tmp_path / "data/a.png", image)
    pairs = pack_pairs(tmp_path / "data", tmp_path / "packed", 8, scale)
    lr, hr = pairs.image(0)
    height, width = 32 // scale, 41 // scale
    assert np.array_equal(hr, image[: height * scale, : width * scale])
    assert np.array_equal(lr, to_uint8(make_lr(to_float(hr), scale))[0])
    lr_crops, hr_crops = pairs.crops(seed=1, step=2, batch=3)
    assert (lr_crops.shape, hr_crops.shape) == ((3, 8, 8, 3), (3, 8 * scale, 8 * scale, 3))


@pytest.mark.parametrize("scale", [2, 3])
def test_training_at_other_scales(scale: int, tmp_path: Path):
    for index in range(2):
        image = np.random.default_rng(index).integers(0, 256, (36, 36, 3), np.uint8)
        save_png(tmp_path / f"data/{index}.png", image)
    config = TrainSRConfig(
        arch="edsr-small", arch_kwargs={"feat": 8, "blocks": 1}, scale=scale, iterations=2, batch_size=1, lr_patch_px=8
    )
    run(config, data=tmp_path / "data", out=tmp_path / "out", runtime=Runtime())
    loaded = load_network(tmp_path / "out")
    assert loaded.scale == scale
    assert loaded.module(torch.rand(1, 3, 8, 8)).shape == (1, 3, 8 * scale, 8 * scale)


def test_scales_that_a_network_does_not_have(tmp_path: Path):
    save_png(tmp_path / "data/a.png", np.zeros((64, 64, 3), np.uint8))
    config = TrainSRConfig(arch="rrdbnet-small", scale=3, iterations=1)
    with pytest.raises(ConfigError, match="by 2 or 4, not by 3"):
        run(config, data=tmp_path / "data", out=tmp_path / "out", runtime=Runtime())
    with pytest.raises(ValidationError, match="2, 3 or 4"):
        TrainSRConfig.model_validate({"scale": 5})
