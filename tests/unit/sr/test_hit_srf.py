"""HiT-SRF: correlation against the paper's equations written out, the pooled bias, padding, any image size."""

import pytest
import torch

from ddsr_core.errors import ConfigError
from ddsr_core.sr.archs.hit_srf import Correlation, HiTSRF, PositionBias
from ddsr_core.sr.networks import build_network, recognize

TINY = {"embed": 40, "heads": (2,), "window_px": (4, 16)}


def noisy(module: torch.nn.Module) -> torch.nn.Module:
    """Biases and tables that are zero at first would hide what is added to what."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


def explicit_bias(layer: PositionBias, window: int, cells: int) -> torch.Tensor:
    """``(heads, S^2, cells^2)`` from all S^4 pairs of tokens, averaged over each cell's."""
    axis = torch.arange(window)
    token = torch.cartesian_prod(axis, axis)
    distances = (token[:, None] - token[None, :]).float()
    bias = layer.pos3(layer.pos2(layer.pos1(layer.pos_proj(distances))))
    cell = window // cells
    bias = bias.view(window**2, cells, cell, cells, cell, -1).mean((2, 4))
    return bias.flatten(1, 2).permute(2, 0, 1)


@pytest.mark.parametrize(("window", "cells"), [(4, 4), (8, 8), (16, 8), (24, 8)])
def test_the_pooled_bias_is_the_mean_over_all_pairs(window, cells):
    torch.manual_seed(0)
    layer = noisy(PositionBias(12, heads=3, window=window, cells=cells))
    with torch.no_grad():
        torch.testing.assert_close(layer(), explicit_bias(layer, window, cells), rtol=0, atol=2e-6)


def correlation_by_equations(layer: Correlation, x: torch.Tensor) -> torch.Tensor:
    """One window ``(S, S, C)``: head by head, every token with every cell, as the paper writes it."""
    size, cells, half = layer.window, layer.cells, x.shape[-1] // 2
    cell, width = size // cells, half // layer.heads
    qv = layer.qv(x.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    q, v = qv[..., :half].reshape(size**2, half), qv[..., half:]
    weight, bias = layer.spatial_linear.weight[0], layer.spatial_linear.bias
    of_cell = torch.stack(
        [
            (v[i * cell : (i + 1) * cell, j * cell : (j + 1) * cell].reshape(cell**2, half) * weight[:, None]).sum(0) + bias
            for i in range(cells)
            for j in range(cells)
        ]
    )
    position = explicit_bias(layer.pos, size, cells)
    spatial = []
    for head in range(layer.heads):
        part = slice(head * width, (head + 1) * width)
        correlations = q[:, part] @ of_cell[:, part].T / width + position[head]
        spatial.append(correlations @ of_cell[:, part])
    v = v.reshape(size**2, half)
    channel = (q.T @ v / size**2 @ v.T).T
    return layer.proj(torch.cat((*spatial, channel), dim=-1)).view(size, size, 2 * half)


@pytest.mark.parametrize("window", [4, 8, 16])
def test_correlation_equals_the_equations(window):
    torch.manual_seed(0)
    layer = noisy(Correlation(dim=40, heads=4, window=window))
    x = torch.randn(1, window, window, 40)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], correlation_by_equations(layer, x[0]), rtol=1e-4, atol=1e-5)


def test_windows_do_not_see_each_other():
    """Beyond the 3x3 convolution of the features, tokens of one window do not reach the next."""
    torch.manual_seed(0)
    layer = noisy(Correlation(dim=40, heads=2, window=8))
    x = torch.randn(1, 8, 24, 40)
    changed = x.clone()
    changed[0, 3, 20] += 1
    seen = (layer(x) - layer(changed)).abs().amax((0, 1, 3)) > 1e-6
    assert seen[16:].all()
    assert not seen[:16].any()


@pytest.mark.parametrize("size", [(16, 16), (5, 23), (1, 2)])
def test_any_size_is_enlarged_by_four(size):
    assert HiTSRF(**TINY)(torch.rand(1, 3, *size)).shape == (1, 3, size[0] * 4, size[1] * 4)


def test_every_parameter_takes_part():
    network = HiTSRF(**TINY)
    network(torch.rand(1, 3, 16, 16)).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_authors_keys_and_shapes():
    """Of the authors' x4 file: 866,420 numbers, all of them parameters."""
    from ddsr_core.sr.networks import own_names, public_names

    with torch.device("meta"):
        state = build_network("hit-srf").state_dict()
    public = public_names("hit-srf", state)
    assert sum(value.numel() for value in public.values()) == 866_420
    block = "layers.3.residual_group.blocks.5."
    assert {name.removeprefix(block): tuple(value.shape) for name, value in public.items() if name.startswith(block)} == {
        "norm1.weight": (60,),
        "norm1.bias": (60,),
        "correlation.qv.conv.0.weight": (12, 60, 1, 1),
        "correlation.qv.conv.0.bias": (12,),
        "correlation.qv.conv.2.weight": (12, 12, 3, 3),
        "correlation.qv.conv.2.bias": (12,),
        "correlation.qv.conv.4.weight": (60, 12, 1, 1),
        "correlation.qv.conv.4.bias": (60,),
        "correlation.qv.linear.weight": (60, 60, 1, 1),
        "correlation.qv.linear.bias": (60,),
        "correlation.proj.weight": (60, 60),
        "correlation.proj.bias": (60,),
        "correlation.spatial_linear.weight": (1, 64),
        "correlation.spatial_linear.bias": (1,),
        "correlation.pos.pos_proj.weight": (3, 2),
        "correlation.pos.pos_proj.bias": (3,),
        **{f"correlation.pos.pos{i}.0.{kind}": (3,) for i in (1, 2, 3) for kind in ("weight", "bias")},
        **{f"correlation.pos.pos{i}.2.weight": (3, 3) for i in (1, 2)},
        **{f"correlation.pos.pos{i}.2.bias": (3,) for i in (1, 2)},
        "correlation.pos.pos3.2.weight": (6, 3),
        "correlation.pos.pos3.2.bias": (6,),
        "norm2.weight": (60,),
        "norm2.bias": (60,),
        "mlp.fc1.weight": (120, 60),
        "mlp.fc1.bias": (120,),
        "mlp.dwconv.depthwise_conv.0.weight": (120, 1, 5, 5),
        "mlp.dwconv.depthwise_conv.0.bias": (120,),
        "mlp.fc2.weight": (60, 120),
        "mlp.fc2.bias": (60,),
    }
    assert own_names("hit-srf", public).keys() == state.keys()
    assert recognize(public)[0] == "hit-srf"


@pytest.mark.parametrize("kwargs", [{"embed": 50, "heads": [6]}, {"window_px": [12]}, {"embed": 16, "heads": [2]}])
def test_sizes_that_do_not_divide_are_refused(kwargs):
    with pytest.raises(ConfigError, match="hit-srf does not take"):
        build_network("hit-srf", kwargs)
