"""Networks by name: sizes, what a wrong name says, and recognition by keys."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ddsr_core.config import Runtime
from ddsr_core.errors import ConfigError
from ddsr_core.imaging.images import save_png
from ddsr_core.sr.architectures import ARCHITECTURES, Architecture, find_architecture
from ddsr_core.sr.archs.edsr import EDSR
from ddsr_core.sr.basicsr_compat import import_basicsr
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.networks import build_network, recognize
from ddsr_core.sr.train_sr import run
from ddsr_core.sr.weights import load_network


class Enlarge(nn.Module):
    """A network of a user's own."""

    def __init__(self, features: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, features, 1)


class Nearest(nn.Module):
    """The file of a new network: nearest-neighbor upscaling and a factor per color."""

    def __init__(self, scale: int = 4) -> None:
        super().__init__()
        self.scale = scale
        self.factor = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * nn.functional.interpolate(x, scale_factor=self.scale)


def test_a_new_network_is_a_module_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(ARCHITECTURES, "nearest", Architecture(f"{__name__}:Nearest"))
    config = TrainSRConfig(arch="nearest", iterations=3, batch_size=2, lr_patch_px=8, scale=2)
    for index in range(2):
        save_png(tmp_path / f"data/{index}.png", np.full((32, 32, 3), 100 + index, np.uint8))
    run(config, data=tmp_path / "data", out=tmp_path / "out", runtime=Runtime())
    loaded = load_network(tmp_path / "out")
    assert (loaded.name, loaded.scale, loaded.module(torch.zeros(1, 3, 8, 8)).shape) == ("nearest", 2, (1, 3, 16, 16))


@pytest.mark.parametrize("name", [name for name, architecture in ARCHITECTURES.items() if architecture.params])
def test_params_are_as_written_and_keys_tell_the_network(name):
    with torch.device("meta"):
        network = build_network(name)
    assert sum(p.numel() for p in network.parameters()) == ARCHITECTURES[name].params
    found, kwargs = recognize(network.state_dict())
    assert found == name
    with torch.device("meta"):
        again = build_network(found, kwargs)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}


def test_published_sizes():
    assert ARCHITECTURES["srformer-light"].params == 872_748  # of the official implementation
    assert ARCHITECTURES["edsr"].params == 1_517_571
    assert ARCHITECTURES["edsr-l"].params == 43_089_923
    assert ARCHITECTURES["rcan"].params == 15_592_355  # and 24 in the authors' two mean shifts, constants
    assert ARCHITECTURES["rrdbnet"].params == 16_697_987
    assert ARCHITECTURES["hit-srf"].params == 866_420


@pytest.mark.parametrize("wrong", ["esdr", "", ":Net", "nets:", "my nets:Net", "nets:Net()", "../nets:Net", ".nets:Net"])
def test_unknown_name_lists_the_names(wrong):
    with pytest.raises(ConfigError, match="unknown architecture") as caught:
        find_architecture(wrong)
    assert all(name in str(caught.value) for name in ARCHITECTURES)


def test_own_network_by_module_and_class():
    network = build_network(f"{__name__}:Enlarge", {"features": 5})
    assert network.conv.out_channels == 5
    with pytest.raises(ConfigError, match="does not take"):
        build_network(f"{__name__}:Enlarge", {"feature": 5})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("os:system", "not a torch.nn.Module"),
        ("no_such_module:X", "cannot import"),
        ("torch.nn:Nothing", "cannot import"),
    ],
)
def test_what_is_no_network_is_refused(name, says):
    with pytest.raises(ConfigError, match=says):
        build_network(name, {"command": "true"})


def test_a_foreign_state_dict_is_not_recognized():
    assert recognize(nn.Conv2d(3, 3, 3).state_dict()) is None


def test_edsr_is_basicsrs_and_moves_as_a_module():
    torch.manual_seed(0)
    ours = EDSR(feat=8, blocks=2)
    theirs = import_basicsr("archs.edsr_arch").EDSR(3, 3, num_feat=8, num_block=2)
    theirs.load_state_dict(ours.state_dict())
    lr = torch.rand(1, 3, 9, 7)
    torch.testing.assert_close(ours(lr), theirs(lr), rtol=0, atol=1e-6)
    assert ours.double()(lr.double()).dtype == torch.float64


TINY = {
    "edsr-small": {"feat": 8, "blocks": 1},
    "rcan-small": {"feat": 8, "groups": 1, "blocks": 1, "reduction": 4},
    "rrdbnet-small": {"feat": 8, "blocks": 1, "grow": 4},
    "srformer-small": {"embed": 8, "depths": [1], "heads": [2], "window": 8},
    "hit-srf-small": {"embed": 40, "heads": [2], "window_px": [4, 16]},
}


@pytest.mark.parametrize("name", TINY)
def test_the_last_layer_stays_in_float32(name):
    with torch.autocast("cpu", torch.bfloat16):
        assert build_network(name, TINY[name])(torch.rand(1, 3, 8, 8)).dtype == torch.float32


@pytest.mark.parametrize("name", TINY)
def test_networks_leave_their_input_alone(name):
    lr = torch.rand(1, 3, 8, 8)
    before = lr.clone()
    build_network(name, TINY[name]).eval()(lr)
    assert torch.equal(lr, before)


def test_rcan_and_rrdbnet_are_basicsrs():
    torch.manual_seed(0)
    lr = torch.rand(1, 3, 9, 7)
    rcan, rrdbnet = build_network("rcan-small", TINY["rcan-small"]), build_network("rrdbnet-small", TINY["rrdbnet-small"])
    theirs = import_basicsr("archs.rcan_arch").RCAN(3, 3, num_feat=8, num_group=1, num_block=1, squeeze_factor=4)
    theirs.load_state_dict(rcan.state_dict())
    torch.testing.assert_close(rcan(lr), theirs(lr), rtol=0, atol=1e-6)
    theirs = import_basicsr("archs.rrdbnet_arch").RRDBNet(3, 3, num_feat=8, num_block=1, num_grow_ch=4)
    theirs.load_state_dict(rrdbnet.state_dict())
    torch.testing.assert_close(rrdbnet(lr), theirs(lr), rtol=0, atol=1e-6)


def test_the_generator_upscales_by_two_or_four():
    with pytest.raises(ConfigError, match="by 2 or 4, not by 3"):
        build_network("rrdbnet", {"scale": 3})
