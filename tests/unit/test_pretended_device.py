"""The pretended device has the rules of a CUDA device, and the numbers of the CPU."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.pretended_device import MixedDevicesError, pretended_cuda


def test_tensors_say_where_they_are():
    with pretended_cuda() as gpu:
        x = torch.zeros(2, device="cuda")
        assert x.device == torch.device("cuda", 0)
        assert (x + 1)[0].device.type == "cuda"
        assert torch.zeros_like(x).is_cuda
        assert torch.arange(3, device=x.device).is_cuda
        assert not torch.zeros(2).is_cuda
        assert x.cpu().device.type == "cpu"
        assert torch.zeros(3).to(x).is_cuda
        assert x.to("cuda") is x
        assert nn.Linear(2, 2).to("cuda").weight.is_cuda
        assert x.new_zeros(2).is_cuda
        assert gpu.holds(x)


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, y: x + y,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: F.conv2d(x[None, None], y[None, None]),
        lambda x, y: x.mul_(y),
        lambda x, y: torch.nn.functional.embedding(torch.tensor([0, 1]), x),
        lambda x, y: y[torch.tensor([0]).to("cuda")],
        lambda x, y: torch._foreach_lerp_([x], [y], 0.5),
    ],
)
def test_mixing_devices_is_an_error(mix):  # type: ignore[no-untyped-def]
    with pretended_cuda():
        x, y = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
        with pytest.raises(MixedDevicesError):
            mix(x, y)


def test_mixing_devices_in_a_backward_pass_is_an_error():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x * 2

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            return grad * torch.ones(2, 2)

    with pretended_cuda():
        x = torch.ones(2, 2, device="cuda", requires_grad=True)
        loss = Scale.apply(x).sum()
        with pytest.raises(MixedDevicesError):
            loss.backward()


def test_numbers_and_copies_may_mix():
    with pretended_cuda():
        x = torch.ones(2, device="cuda")
        assert (x * torch.tensor(2.0)).sum().is_cuda
        x.copy_(torch.arange(2.0))
        assert x.tolist() == [0, 1]
        assert x.is_cuda


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).all()),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: torch.nonzero(x),
        lambda x: x.unique(),
        lambda x: x[x > 0],
        lambda x: x[torch.tensor([0, 1])],
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: x.new_tensor([1.0]),
        lambda x: torch.ones(2).to(x.device),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_waits_for_the_device_is_recorded(wait):  # type: ignore[no-untyped-def]
    with pretended_cuda() as gpu:
        x = torch.ones(3, device="cuda")
        assert gpu.syncs == []
        wait(x)
        assert len(gpu.syncs) == 1


def test_what_does_not_wait_is_not_recorded():
    with pretended_cuda() as gpu:
        x = torch.ones(3, device="cuda")
        index = torch.tensor([0, 2]).to("cuda", non_blocking=True)
        assert (x[index] + torch.full((2,), 1.0, device=x.device)).sum().is_cuda
        assert torch.where(x > 0, x, 0.0).is_cuda
        assert gpu.syncs == []


def test_numpy_refuses_tensors_of_the_device():
    with pretended_cuda():
        x = torch.ones(3, device="cuda")
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        with pytest.raises(TypeError, match="numpy"):
            np.asarray(x)
        assert np.asarray(x.cpu()).tolist() == [1, 1, 1]


def test_random_numbers_of_the_device_need_its_generator():
    with pretended_cuda(), pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, device="cuda", generator=torch.Generator())


def train(device: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    x, index = torch.rand(2, 3, 8, 8).to(device), torch.tensor([1, 1, 0]).to(device)
    for _ in range(3):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            output = network(x)[index]
        loss = F.normalize(output.float()).square().sum() + output.float().std()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [parameter.detach().cpu() for parameter in network.parameters()]


def test_training_gives_the_numbers_of_the_cpu():
    expected = train("cpu")
    with pretended_cuda() as gpu:
        got = train("cuda")
        assert {sync.what for sync in gpu.syncs} == {"copy to the device", "copy to the CPU"}
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
