"""Official RRDBNet weights in ncnn's format."""

import pytest
import torch

from ddsr_core.errors import InputError
from ddsr_core.sr.ncnn import HALF, read_rrdbnet
from ddsr_core.sr.networks import build_network
from ddsr_core.sr.weights import load_network

CONVOLUTIONS = 351  # 23 x 3 x 5 + 6


def as_ncnn(state) -> bytes:
    """Flag, float16 weights padded to 4 bytes, float32 bias, for each convolution."""
    parts = []
    for name, value in state.items():
        if name.endswith(".weight"):
            half = value.numpy().astype("<f2").tobytes()
            parts += [HALF.to_bytes(4, "little"), half, bytes(-len(half) % 4)]
        else:
            parts.append(value.numpy().astype("<f4").tobytes())
    return b"".join(parts)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return {name: value.clone() for name, value in build_network("rrdbnet").state_dict().items()}


def test_every_convolution_comes_back_in_half_precision(state, tmp_path):
    data = as_ncnn(state)
    assert len(state) == 2 * CONVOLUTIONS
    read = read_rrdbnet(data)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], value.half().float() if "weight" in name else value) for name, value in state.items())
    (tmp_path / "realesrgan-x4plus.bin").write_bytes(data)
    loaded = load_network(tmp_path / "realesrgan-x4plus.bin")
    assert (loaded.name, loaded.scale) == ("rrdbnet", 4)


def test_other_files_are_refused(state, tmp_path):
    data = as_ncnn(state)
    for content, says in (
        (data[:-4], "ends before conv_last.bias"), (data + b"abcd", "4 bytes are left over"),
        (b"\0" * 64, "half precision"), (b"", "half precision"),
    ):  # fmt: skip
        (tmp_path / "x.bin").write_bytes(content)
        with pytest.raises(InputError, match=says):
            load_network(tmp_path / "x.bin")
