"""SRFormer: permuted attention against a loop over queries, masks by what can be seen, any image size."""

import pytest
import torch

from ddsr_core.sr.archs.srformer import (
    PermutedAttention,
    SRFormer,
    fold_cells,
    reflect_to_multiple,
    relative_index,
    shift_mask,
    unwindows,
    windows,
)


def attention_by_loops(layer: PermutedAttention, x: torch.Tensor) -> torch.Tensor:
    """One window ``(S, S, C)``: every query against every 2x2 cell of keys, head by head, as the paper draws it."""
    size, cells, width = layer.window, layer.window // 2, layer.dim // layer.heads
    q = layer.q(x)
    k, v = layer.kv(x).chunk(2, dim=-1)
    out = torch.zeros_like(q)
    for row in range(size):
        for column in range(size):
            for head in range(layer.heads):
                part = slice(head * width, (head + 1) * width)
                scores, values = [], []
                for i in range(cells):
                    for j in range(cells):
                        key = k[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(-1)
                        place = (row // 2 - i + cells - 1) * (2 * cells - 1) + column // 2 - j + cells - 1
                        score = q[row, column, part] @ key[part] / width**0.5
                        scores.append(score + layer.relative_position_bias_table[place, head])
                        values.append(v[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(-1)[part])
                out[row, column, part] = torch.softmax(torch.stack(scores), 0) @ torch.stack(values)
    return layer.proj(out)


def test_permuted_attention_equals_the_loop():
    torch.manual_seed(0)
    layer = PermutedAttention(dim=8, heads=2, window=4)
    torch.nn.init.normal_(layer.relative_position_bias_table)
    x = torch.randn(1, 4, 8, 8)  # two windows side by side
    with torch.no_grad():
        found = layer(x, None)[0]
        torch.testing.assert_close(found[:, :4], attention_by_loops(layer, x[0, :, :4]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[:, 4:], attention_by_loops(layer, x[0, :, 4:]), rtol=1e-5, atol=1e-6)


def test_windows_by_hand():
    x = torch.arange(16.0).view(1, 4, 4, 1)
    assert windows(x, 2)[1, :, 0].tolist() == [2, 3, 6, 7]
    assert fold_cells(x)[0, 1, 0].tolist() == [8, 9, 12, 13]
    y = torch.randn(3, 8, 12, 5)
    assert torch.equal(unwindows(windows(y, 4), 4, 8, 12), y)
    assert relative_index(2).tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


def test_shifted_windows_do_not_see_across_the_border():
    """Pixel (0, 0) shares a shifted window with the bottom and right edges only by wrapping round."""
    torch.manual_seed(0)
    layer = PermutedAttention(dim=8, heads=2, window=4)
    mask = shift_mask(8, 8, 4, torch.device("cpu"))

    def shifted(x):
        return layer(x.roll((-2, -2), (1, 2)), mask).roll((2, 2), (1, 2))

    x = torch.randn(1, 8, 8, 8)
    changed = x.clone()
    changed[0, 0, 0] += 1
    seen = (shifted(x) - shifted(changed)).abs().amax((0, 3)) > 1e-6
    assert seen[:2, :2].all()
    assert not seen[2:].any()
    assert not seen[:, 2:].any()


@pytest.mark.parametrize(
    ("size", "multiple", "expected"),
    [
        (5, 8, [0, 1, 2, 3, 4, 3, 2, 1]),
        (3, 8, [0, 1, 2, 1, 0, 1, 2, 1]),
        (1, 4, [0, 0, 0, 0]),
        (4, 4, [0, 1, 2, 3]),
    ],
)
def test_reflection_by_hand(size, multiple, expected):
    x = torch.arange(float(size)).view(1, size, 1)
    assert reflect_to_multiple(x, 1, multiple)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("size", [(16, 16), (5, 23), (3, 3), (1, 2)])
def test_any_size_is_enlarged_by_four(size):
    network = SRFormer(embed=8, depths=(2,), heads=(2,), window=8)
    assert network(torch.rand(1, 3, *size)).shape == (1, 3, size[0] * 4, size[1] * 4)


def test_padding_does_not_reach_inside():
    """Far from the padded border the result is that of a larger image with the same content there."""
    torch.manual_seed(0)
    network = SRFormer(embed=8, depths=(2,), heads=(2,), window=8).eval()
    lr = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        difference = (network(lr)[..., :96, :96] - network(lr[..., :60, :60])[..., :96, :96]).abs().max()
    assert difference < 1e-6


def test_every_parameter_takes_part():
    network = SRFormer(embed=8, depths=(2, 2), heads=(2, 2), window=8)
    network(torch.rand(1, 3, 16, 16)).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
