"""Minimax memories and losses against small examples with known values."""

import math

import pytest
import torch

from ddsr_core.diffusion.minimax import Memories, Memory, minimax_losses


def latents(*vectors: tuple[float, float]) -> torch.Tensor:
    """``(B, 1, 1, 2)``: two numbers per latent, so that every cosine is obvious."""
    return torch.tensor(vectors, dtype=torch.float32)[:, None, None, :]


def degrees(*angles: float) -> torch.Tensor:
    return latents(*((math.cos(math.radians(a)), math.sin(math.radians(a))) for a in angles))


def test_memory_is_first_in_first_out_per_class():
    memory = Memory(size=2)
    memory.append(latents((1, 0), (2, 0), (3, 0)), torch.tensor([5, 7, 5]))
    memory.append(latents((4, 0)), torch.tensor([5]))
    assert memory.queues[5].tolist() == [[3, 0], [4, 0]]
    assert memory.queues[7].tolist() == [[2, 0]]


def test_memory_entries_carry_no_gradient_and_are_copies_in_float32():
    memory = Memory(size=4)
    x = latents((1, 2)).requires_grad_()
    memory.append(x.bfloat16(), torch.tensor([0]))
    assert not memory.queues[0].requires_grad
    assert memory.queues[0].dtype == torch.float32


def test_memory_survives_a_checkpoint_in_order():
    memory = Memory(size=3)
    memory.append(latents((1, 0), (0, 1)), torch.tensor([10, 2]))
    again = Memory(size=3)
    again.load_state_dict(memory.state_dict())
    for one in (memory, again):
        one.append(latents((5, 5), (6, 6), (7, 7)), torch.tensor([10, 10, 10]))
    assert again.queues[10].tolist() == memory.queues[10].tolist() == [[5, 5], [6, 6], [7, 7]]


def test_extremes_are_taken_over_the_whole_matrix_and_averaged_over_classes():
    real, pseudo = Memory(64), Memory(64)
    real.append(degrees(0, 30, 90), torch.tensor([0, 0, 1]))
    pseudo.append(degrees(80, 100), torch.tensor([0, 1]))
    x0_hat = degrees(10, 40, 90)  # classes 0, 0, 1
    l_r, l_d = minimax_losses(x0_hat, torch.tensor([0, 0, 1]), Memories(real, pseudo))
    # class 0: angles to {0, 30} are 10, 20, 40, 10 -> min cos 40; to {80}: 70, 40 -> max cos 40. class 1: 0 and 10.
    cos = {a: math.cos(math.radians(a)) for a in (0, 10, 40)}
    assert l_r.item() == pytest.approx(((1 - cos[40]) + (1 - cos[0])) / 2, abs=1e-6)
    assert l_d.item() == pytest.approx((cos[40] + cos[10]) / 2, abs=1e-6)


def test_an_empty_memory_adds_nothing_but_its_class_still_counts():
    real = Memory(64)
    real.append(degrees(60), torch.tensor([0]))
    l_r, l_d = minimax_losses(degrees(0, 45), torch.tensor([0, 1]), Memories(real, Memory(64)))
    assert l_r.item() == pytest.approx((1 - 0.5) / 2, abs=1e-6)
    assert l_d.item() == 0.0


def test_a_first_step_has_no_loss_and_no_gradient_as_nothing_is_compared_with_its_own_batch():
    x0_hat = degrees(0, 10).requires_grad_()
    l_r, l_d = minimax_losses(x0_hat, torch.tensor([0, 0]), Memories.of_size(64))
    (l_r + l_d).backward()
    assert (l_r.item(), l_d.item()) == (0, 0)
    assert x0_hat.grad is not None
    assert not x0_hat.grad.any()


@pytest.mark.parametrize(("term", "expected"), [(0, [False, True]), (1, [True, False])])
def test_one_pair_per_class_gets_gradient(term: int, expected: list[bool]):
    memory = Memory(64)
    memory.append(degrees(-10, -15), torch.tensor([0, 0]))
    x0_hat = degrees(20, 50).requires_grad_()  # 20 is nearest to the memory, 50 farthest
    minimax_losses(x0_hat, torch.tensor([0, 0]), Memories(memory, memory))[term].backward()
    assert x0_hat.grad is not None
    assert x0_hat.grad.flatten(1).abs().sum(1).gt(1e-6).tolist() == expected


def test_descending_pulls_towards_real_latents_and_away_from_predictions():
    def step(term: int) -> float:
        memory = Memory(64)
        memory.append(degrees(0), torch.tensor([0]))
        x = degrees(30).requires_grad_()
        minimax_losses(x, torch.tensor([0]), Memories(memory, memory))[term].backward()
        assert x.grad is not None
        moved = (x - 0.1 * x.grad).flatten()
        return math.degrees(math.atan2(moved[1].item(), moved[0].item()))

    assert step(0) < 30 < step(1)


def test_cosine_does_not_see_scale():
    real = Memory(64)
    real.append(degrees(0), torch.tensor([0]))
    label = torch.tensor([0])
    assert torch.allclose(
        minimax_losses(100 * degrees(50), label, Memories(real, real))[0],
        minimax_losses(degrees(50), label, Memories(real, real))[0],
    )


def test_samples_that_do_not_count_have_no_gradient_and_set_no_extreme():
    real, pseudo = Memory(8), Memory(8)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(4, 1, 2, 2, generator=generator)
    labels = torch.tensor([0, 0, 1, 1])
    for memory in Memories(real, pseudo):
        memory.append(torch.randn(6, 1, 2, 2, generator=generator), torch.tensor([0, 0, 0, 1, 1, 1]))
    counted = torch.tensor([True, False, False, False])
    seen = x.clone().requires_grad_()
    l_r, l_d = minimax_losses(seen, labels, Memories(real, pseudo), counted)
    (l_r + l_d).backward()
    assert seen.grad is not None
    assert seen.grad.abs().sum((1, 2, 3)).gt(0).tolist() == [True, False, False, False]
    alone = minimax_losses(x[:1], labels[:1], Memories(real, pseudo))
    torch.testing.assert_close(torch.stack([l_r, l_d]), torch.stack(alone) / 2)  # two classes are in the batch
    none = minimax_losses(x, labels, Memories(real, pseudo), torch.zeros(4, dtype=torch.bool))
    assert [float(value) for value in none] == [0.0, 0.0]
