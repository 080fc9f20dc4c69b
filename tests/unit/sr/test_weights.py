"""Weights: what is written can be read by us, as params_ema and through spandrel; wrong files are named as such."""

import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from spandrel.architectures.RCAN import RCAN
from torch import nn

from ddsr_core.errors import InputError
from ddsr_core.sr.networks import build_network, public_names
from ddsr_core.sr.weights import load_network, named_class, save_weights
from ddsr_core.storage.safetensors_bytes import safetensors_bytes

KWARGS = {
    "edsr-small": {"feat": 8, "blocks": 2, "res_scale": 0.5},
    "rcan-small": {"feat": 8, "groups": 2, "blocks": 2, "reduction": 4},
    "rrdbnet-small": {"feat": 8, "blocks": 2, "grow": 4},
    "srformer-small": {"embed": 8, "depths": [2], "heads": [2], "window": 8},
    "hit-srf-small": {"embed": 40, "heads": [2], "window_px": [4, 8, 16]},
}


@pytest.mark.parametrize("arch", KWARGS)
def test_what_is_written_can_be_read(arch, tmp_path):
    network = build_network(arch, KWARGS[arch]).eval()
    save_weights(tmp_path, network, arch, KWARGS[arch], 4, {"iterations": 3})
    lr = torch.rand(1, 3, 8, 8)
    for path in (tmp_path, tmp_path / "weights.safetensors", tmp_path / "weights.pth"):
        module, scale, name = load_network(path)
        assert (scale, name, module.training) == (4, arch, False)
        assert torch.equal(module(lr), network(lr))
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        assert set(file.keys()) == set(public_names(arch, network.state_dict()))
        assert file.metadata()["arch"] == arch
    params_ema = torch.load(tmp_path / "weights.pth", weights_only=True)["params_ema"]
    assert params_ema.keys() == public_names(arch, network.state_dict()).keys()


@pytest.mark.parametrize("arch", KWARGS)
def test_bare_state_dicts_are_recognized(arch, tmp_path):
    kwargs = {**KWARGS[arch], **({"res_scale": 1.0} if arch.startswith("edsr") else {})}
    network = build_network(arch, kwargs).eval()
    torch.save(network.state_dict(), tmp_path / "x.pth")
    lr = torch.rand(1, 3, 8, 8)
    assert torch.equal(load_network(tmp_path / "x.pth").module(lr), network(lr))


def test_saving_twice_gives_the_same_bytes(tmp_path):
    network = build_network("edsr-small", KWARGS["edsr-small"])
    for name in ("a", "b"):
        save_weights(tmp_path / name, network, "edsr-small", KWARGS["edsr-small"], 4, {})
    for name in ("weights.safetensors", "weights.pth", "model.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_safetensors_metadata_is_in_order_in_every_process(tmp_path):
    """The library's own order changes from process to process."""
    program = (
        "import sys, torch; from ddsr_core.storage.safetensors_bytes import safetensors_bytes as s;"
        "sys.stdout.buffer.write(s({'b': torch.ones(3), 'a': torch.eye(2)}, {k: k * 3 for k in 'qwertzuiop'}))"
    )
    outputs = {subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout for _ in range(2)}
    assert outputs == {safetensors_bytes({"b": torch.ones(3), "a": torch.eye(2)}, {k: k * 3 for k in "qwertzuiop"})}
    (tmp_path / "x.safetensors").write_bytes(outputs.pop())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("a"), torch.eye(2))
        assert file.metadata()["q"] == "qqq"


def test_networks_of_spandrel_load_and_leave_their_input_alone(tmp_path):
    """Its RCAN multiplies the caller's tensor by 255 in place; one that unshuffles first is not ours."""
    torch.manual_seed(0)
    network = RCAN(scale=2, n_resgroups=1, n_resblocks=1, n_feats=16, reduction=4, unshuffle_mod=True).eval()
    torch.save({"params_ema": network.state_dict()}, tmp_path / "rcan.pth")
    module, scale, name = load_network(tmp_path / "rcan.pth")
    lr = torch.rand(1, 3, 8, 8)
    before = lr.clone()
    with torch.no_grad():
        sr = module(lr)
        assert torch.equal(lr, before)
        torch.testing.assert_close(sr, network(before.clone()).clamp(0, 1))
    assert (scale, name) == (2, "RCAN")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x08\0\0\0\0\0\0\0"]), rest=st.binary(max_size=60))
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_any_bytes_end_in_one_message(name, start, rest, tmp_path):
    (tmp_path / name).write_bytes(start + rest)
    with pytest.raises(InputError):
        load_network(tmp_path / name)


def write_wrong_file(folder, kind):
    path = folder / ("x.safetensors" if kind in ("cut off", "unknown network") else "x.pth")
    match kind:
        case "text":
            path.write_text("no weights")
        case "pickled code":
            path.write_bytes(pickle.dumps({"params": print}))
        case "cut off":
            path.write_bytes(safetensors_bytes({"a": torch.ones(100)}, {})[:50])
        case "unknown network":
            save_file(nn.Conv2d(3, 3, 3).state_dict(), path)
        case "no state dict":
            torch.save([1, 2], path)
        case "half a network":
            state = build_network("edsr-small").state_dict()
            state.popitem()
            torch.save(state, path)
        case "another suffix":
            path = folder / "x.txt"
            path.write_bytes(b"")
        case "empty folder":
            path = folder / "empty"
            path.mkdir()
        case "damaged identity":
            torch.save({"params_ema": {"a": torch.zeros(1)}, "ddsr": {"arch": "edsr", "kwargs": "[1]", "scale": "4"}}, path)
        case "a function instead of a class":
            save_weights(folder, build_network("edsr-small"), "os:system", {"command": "touch pwned"}, 4, {})
            path = folder / "weights.safetensors"
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("text", "cannot read weights"),
        ("pickled code", "cannot read weights"),
        ("cut off", "cannot read weights"),
        ("unknown network", "unknown network"),
        ("no state dict", "no state dict"),
        ("half a network", "do not fit edsr"),
        ("damaged identity", "arguments are not a mapping"),
        ("another suffix", "not a format of weights"),
        ("empty folder", "no weights file"),
        ("a function instead of a class", "tries to import os:system"),
    ],
)
def test_wrong_files(kind, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says) as caught:
        load_network(write_wrong_file(tmp_path, kind))
    assert str(tmp_path) in caught.value.where
    assert not (tmp_path / "pwned").exists()


class Own(nn.Module):
    """A network of a user's own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 48, 3, padding=1)

    def forward(self, x):
        return nn.functional.pixel_shuffle(self.conv(x), 4)


def test_a_class_that_a_file_names_is_imported_only_if_it_is_trusted(tmp_path):
    name = f"{__name__}:Own"
    save_weights(tmp_path, Own(), name, {}, 4, {})
    for trust in (False, (), ("other.module:Own",)):
        with pytest.raises(InputError, match="tries to import") as caught:
            load_network(tmp_path, trust)
        assert "--trust" in str(caught.value)
    for trust in (True, (name,)):
        assert load_network(tmp_path, trust).name == name
    assert named_class(tmp_path) == named_class(tmp_path / "weights.pth") == name


def test_nothing_is_imported_for_a_file_that_is_not_trusted(tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("open('imported', 'w').close()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    save_weights(tmp_path / "w", Own(), "evil_module:Net", {}, 4, {})
    with pytest.raises(InputError, match="tries to import evil_module:Net"):
        load_network(tmp_path / "w")
    assert named_class(tmp_path / "w") == "evil_module:Net"
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("changes", [{"feat": 10**6}, {"blocks": 10**9}, {"scale": 2}, {"scale": 10**5}, {"feat": "8"}])
def test_sizes_in_metadata_that_are_not_those_of_the_tensors_are_refused(changes, tmp_path):
    network = build_network("edsr-small", KWARGS["edsr-small"])
    save_weights(tmp_path, network, "edsr-small", {**KWARGS["edsr-small"], **changes}, 4, {})
    with pytest.raises(InputError, match="weights do not fit edsr-small"):
        load_network(tmp_path)


def test_a_window_of_any_size_is_refused(tmp_path):
    kwargs = KWARGS["hit-srf-small"]
    save_weights(
        tmp_path, build_network("hit-srf-small", kwargs), "hit-srf-small", {**kwargs, "window_px": [4, 8, 10**6]}, 4, {}
    )
    with pytest.raises(InputError, match="window_px"):
        load_network(tmp_path)


def test_a_zip_bomb_is_refused_by_its_declared_size(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"")
        archive.writestr("archive/data/0", bytes(2**26))
    with pytest.raises(InputError, match="would unpack to"):
        load_network(tmp_path / "bomb.pth")


def test_a_tensor_larger_than_its_file_is_refused(tmp_path):
    state = build_network("edsr-small", KWARGS["edsr-small"]).state_dict()
    state["conv_first.bias"] = torch.zeros(1).expand(10**9)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(InputError, match="larger than the file"):
        load_network(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {}},
        lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"net": {"params": state}},
        lambda state: {"params": {name: value * 0 for name, value in state.items()}, "params_ema": state},
    ],
)
def test_weights_as_others_wrap_them(wrap, tmp_path):
    network = build_network("rrdbnet-small", KWARGS["rrdbnet-small"]).eval()
    torch.save(wrap(network.state_dict()), tmp_path / "x.pth")
    lr = torch.rand(1, 3, 8, 8)
    assert torch.equal(load_network(tmp_path / "x.pth").module(lr), network(lr))


def as_edsr_pytorch(state, blocks):
    """basicsr's names to those of the authors' code, written out from its list of layers."""
    renamed = {}
    for name, value in state.items():
        place, _, kind = name.rpartition(".")
        outer = {"conv_first": "head.0", "conv_after_body": f"body.{blocks}", "conv_last": "tail.1"}
        inner = place.replace(".conv1", ".body.0").replace(".conv2", ".body.2").replace("upsample.", "tail.0.")
        renamed[f"{outer.get(place, inner)}.{kind}"] = value
    mean = 255 * torch.tensor([0.4488, 0.4371, 0.4040])
    eye = torch.eye(3).view(3, 3, 1, 1)
    return {**renamed, "sub_mean.weight": eye, "sub_mean.bias": -mean, "add_mean.weight": eye, "add_mean.bias": mean}


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_official_edsr_files_open(scale, tmp_path):
    network = build_network("edsr-small", {"feat": 8, "blocks": 2, "res_scale": 1.0, "scale": scale}).eval()
    official = as_edsr_pytorch(network.state_dict(), 2)
    assert {"head.0.weight", "body.1.body.2.bias", "body.2.weight", "tail.0.0.weight", "tail.1.bias"} <= set(official)
    torch.save(official, tmp_path / "edsr.pt")
    loaded = load_network(tmp_path / "edsr.pt")
    lr = torch.rand(1, 3, 8, 8)
    assert (loaded.scale, loaded.name) == (scale, "edsr-small")
    assert torch.equal(loaded.module(lr), network(lr))
