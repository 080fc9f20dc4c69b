"""Networks by name: sizes, what a wrong name says, and recognition by keys."""

import pytest
import torch
from torch import nn

from ddsr_core.basicsr_compat import import_basicsr
from ddsr_core.errors import ConfigError
from ddsr_core.sr.architectures import ARCHITECTURES, build_network, find_architecture, recognise
from ddsr_core.sr.edsr import EDSR


class Enlarge(nn.Module):
    """A network of a user's own."""

    def __init__(self, features: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, features, 1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_params_are_as_written_and_keys_tell_the_network(name):
    with torch.device("meta"):
        network = build_network(name)
    assert sum(p.numel() for p in network.parameters()) == ARCHITECTURES[name].params
    found, kwargs = recognise(network.state_dict())
    assert found == name
    with torch.device("meta"):
        again = build_network(found, kwargs)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}


def test_published_sizes():
    assert ARCHITECTURES["srformer-light"].params == 872_748  # of the official implementation
    assert ARCHITECTURES["edsr"].params == 1_517_571
    assert ARCHITECTURES["edsr-l"].params == 43_089_923


def test_unknown_name_lists_the_names():
    with pytest.raises(ConfigError) as caught:
        find_architecture("esdr")
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


def test_a_foreign_state_dict_is_not_recognised():
    assert recognise(nn.Conv2d(3, 3, 3).state_dict()) is None


def test_edsr_is_basicsrs_and_moves_as_a_module():
    torch.manual_seed(0)
    ours = EDSR(feat=8, blocks=2)
    theirs = import_basicsr("archs.edsr_arch").EDSR(3, 3, num_feat=8, num_block=2)
    theirs.load_state_dict(ours.state_dict())
    lr = torch.rand(1, 3, 9, 7)
    torch.testing.assert_close(ours(lr), theirs(lr), rtol=0, atol=1e-6)
    assert ours.double()(lr.double()).dtype == torch.float64


@pytest.mark.parametrize("name", ["edsr-small", "srformer-small"])
def test_the_last_layer_stays_in_float32(name):
    with torch.autocast("cpu", torch.bfloat16):
        assert build_network(name)(torch.rand(1, 3, 8, 8)).dtype == torch.float32
