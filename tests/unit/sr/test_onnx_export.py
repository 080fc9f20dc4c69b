"""ONNX files: the same pictures as PyTorch at sizes that were not traced."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from ddsr_core.errors import ConfigError
from ddsr_core.sr.architectures import ARCHITECTURES
from ddsr_core.sr.networks import build_network
from ddsr_core.sr.onnx_export import CHECKED_PX, export_onnx

TINY = {
    "edsr-small": {"feat": 8, "blocks": 1},
    "rcan-small": {"feat": 8, "groups": 1, "blocks": 1, "reduction": 4},
    "rrdbnet-small": {"feat": 8, "blocks": 1, "grow": 4},
    "srformer-small": {"embed": 8, "depths": [2], "heads": [2], "window": 8},
    "hit-srf-small": {"embed": 40, "heads": [2], "window_px": [4, 16]},
}


class BySize(nn.Module):
    """Cannot be written with open sizes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if int(x.mean() * x.shape[2]) > 5 else x


class OtherWhenExported(nn.Module):
    """Can be written, but computes something else then."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.tensor(float(torch.jit.is_tracing() or torch.compiler.is_exporting()) + 1)


@pytest.fixture
def onnxruntime():
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed: no ONNX files")
    return pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: nothing to check ONNX files with")


@pytest.mark.parametrize("arch", TINY)
def test_onnx_gives_what_pytorch_gives(arch, tmp_path, onnxruntime):
    torch.manual_seed(0)
    network = build_network(arch, TINY[arch])
    differences = export_onnx(network, tmp_path / "x.onnx")
    assert set(differences) == set(CHECKED_PX)
    assert max(differences.values()) < 1e-5
    assert network.training  # as it came
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    network.eval()
    for shape in [(2, 3, 16, 16), (1, 3, 5, 23), (1, 3, 24, 9), (3, 3, 3, 3)]:
        lr = torch.rand(shape)
        with torch.no_grad():
            sr = network(lr).numpy()
        np.testing.assert_allclose(session.run(["sr"], {"lr": lr.numpy()})[0], sr, rtol=0, atol=1e-5)


def test_no_network_is_left_out():
    assert set(TINY) == {name for name in ARCHITECTURES if name.endswith("-small")}


def test_the_file_says_nothing_of_this_machine(tmp_path, onnxruntime):
    export_onnx(build_network("edsr-small", TINY["edsr-small"]), tmp_path / "x.onnx")
    content = (tmp_path / "x.onnx").read_bytes()
    assert b"ddsr_core" not in content
    assert b".py" not in content


def test_what_cannot_be_written_is_one_message(tmp_path, onnxruntime):
    with pytest.raises(ConfigError, match="BySize cannot be written as ONNX"):
        export_onnx(BySize(), tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


def test_a_file_that_gives_other_images_is_not_written(tmp_path, onnxruntime):
    with pytest.raises(ConfigError, match="OtherWhenExported gives other images of 16x24 px"):
        export_onnx(OtherWhenExported(), tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    for name in [name for name in sys.modules if name.split(".")[0] in ("onnx", "onnxscript", "onnxruntime")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match="onnx and onnxscript and onnxruntime") as caught:
        export_onnx(nn.Identity(), tmp_path / "x.onnx")
    assert "pip install onnx onnxscript onnxruntime" in caught.value.fix
