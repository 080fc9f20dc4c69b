"""FLOPs and memory on fake tensors, against formulas and against torch's own counter on real ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddsr_core.diffusion.dit import DiT, DiTConfig
from ddsr_core.planning.counting import Answers, Count, Op, counting, mixed

SMALL = DiTConfig(latent_px=8, hidden=32, depth=2, heads=2)


def test_a_linear_layer_takes_two_flops_per_weight_and_row_forward_and_four_backward():
    with counting() as count:
        layer, x = nn.Linear(32, 16, bias=False), torch.randn(8, 32, requires_grad=True)
        count.take()
        loss = layer(x).sum()
        assert count.take().flops == 2 * 8 * 32 * 16
        loss.backward()
        assert count.take().flops == 4 * 8 * 32 * 16


def test_the_flops_of_a_network_are_those_that_torch_counts_on_real_tensors():
    x, t, y = torch.randn(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long)
    with FlopCounterMode(display=False) as real:
        DiT(SMALL)(x, t, y).square().mean().backward()
    with counting() as count:
        DiT(SMALL)(torch.randn(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long)).square().mean().backward()
    assert count.flops == real.get_total_flops() > 0


def test_half_precision_under_autocast_is_noted_with_the_operators():
    with counting() as count, torch.autocast("cpu", torch.bfloat16):
        nn.Linear(8, 8)(torch.randn(4, 8))
    assert [op.half for op in count.ops if op.kind == "matmul"] == [True]


def test_the_peak_is_that_of_the_storages_alive_at_one_time():
    with counting() as count:
        a = torch.empty(1000)
        b = a + 1
        del a
        c = b + 1
        c.view(10, 100)  # no new storage
        assert count.live_bytes == 8000
        del b, c
    assert count.peak_bytes == 8000
    assert count.live_bytes == 0


def test_activations_that_autograd_keeps_are_alive():
    with counting() as count:
        x = torch.randn(100, requires_grad=True)
        y = x.exp().exp().sum()
        assert count.live_bytes == 4 * (100 + 100 + 100 + 1)
        y.backward()
        del y
        assert count.live_bytes == 4 * (100 + 100)  # x and its gradient


def test_masks_have_the_share_of_true_values_that_is_asked_for():
    with counting(Answers(share=0.25)):
        mask = torch.randn(8) > 0
        assert torch.nonzero(mask).shape == (2, 1)
        assert torch.randn(8, 5)[mask].shape == (2, 5)


def test_numbers_that_code_asks_for_are_stand_ins():
    with counting(Answers(number=3.0, distinct=2)):
        x = torch.randn(4)
        assert (float(x.sum()), x.tolist()) == (3.0, [3.0] * 4)
        assert len(torch.zeros(5, dtype=torch.long).unique()) == 2
        assert bool((x > 0).all())


def test_work_adds_up_and_its_peak_does_not():
    op, other = Op("matmul", False, 10, 4), Op("other", False, 0, 4)
    first, second = Count(), Count()
    first.ops[op], first.peak_bytes = 2, 5
    second.ops[op], second.ops[other], second.peak_bytes = 1, 1, 7
    total = first.times(1.5) + second
    assert (total.flops, total.ops[other], total.peak_bytes) == (40, 1, 7)


def test_what_grows_with_every_block_is_counted_on_few_blocks():
    def of(depth: int) -> Count:
        with counting() as count:
            model = DiT(SMALL.model_copy(update={"depth": depth}))
            count.take()
            F.mse_loss(model(torch.randn(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long)),
                       torch.zeros(2, 8, 8, 8)).backward()  # fmt: skip
            return count.take()

    assert mixed(of(1), of(2), 4).flops == pytest.approx(of(5).flops)


WEIGHTS_AFTER_COUNTING = """
import torch
from ddsr_core.planning.counting import counting
before = torch.nn.init.kaiming_uniform_
with counting():
    from diffusers import AutoencoderTiny
    AutoencoderTiny()
AutoencoderTiny().save_pretrained("{folder}")
AutoencoderTiny.from_pretrained("{folder}", local_files_only=True)
assert torch.nn.init.kaiming_uniform_ is before
"""


def test_networks_are_initialized_after_something_was_counted(tmp_path: Path):
    """In a process of its own, where no library that keeps references to torch's initializers is imported yet."""
    code = WEIGHTS_AFTER_COUNTING.format(folder=tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
