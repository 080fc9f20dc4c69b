"""Time of a HiT-SRF training step compared with the same step written as in the paper's equations.

    python -m benchmarks.hit_srf [--batch 1] [--patch 64] [--steps 3] [--threads 2] [--clock cpu]

Three implementations of one network take turns step by step in one process, so that other load slows all of them:

- ``ddsr``: bias pooled on the map of relative positions, correlations never computed (`ddsr_core.sr.archs.hit_srf`);
- ``explicit bias``: the same, but every forward pass reads the bias at all S^4 pairs of tokens and averages over cells;
- ``equations``: explicit bias, and the correlations of every token with every cell of its window.

They start from the same weights and see the same random batches. The last column of the table is the largest difference
of their outputs before the first step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ddsr_core.sr.archs.hit_srf import Correlation, PositionBias
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.plan import plan_of
from ddsr_core.sr.state import State, new_state
from ddsr_core.sr.train_sr import train_step


class ExplicitBias(PositionBias):
    """The MLP on the map of relative positions, read for every pair of tokens, then averaged over each cell's tokens."""

    def forward(self) -> Tensor:
        """``(heads, window^2, cells^2)``."""
        size, cell = self.window, self.cell
        of_distance = self.pos3(self.pos2(self.pos1(self.pos_proj(self.offsets.flatten(0, 1)))))
        axis = torch.arange(size, device=of_distance.device)
        token = torch.cartesian_prod(axis, axis)
        distance = token[:, None] - token[None, :] + size - 1  # S^2, S^2, 2
        pairs = of_distance[(distance[..., 0] * (2 * size - 1) + distance[..., 1]).flatten()]
        cells = size // cell
        bias = pairs.view(size**2, cells, cell, cells, cell, -1).mean((2, 4))
        return bias.flatten(1, 2).permute(2, 0, 1)


class EquationsCorrelation(Correlation):
    """Correlates tokens with cells, then weights the cells by the correlations."""

    def spatial(self, q: Tensor, pooled: Tensor) -> Tensor:
        width = q.shape[-1] // self.heads
        queries, cells = (x.unflatten(-1, (self.heads, width)).transpose(1, 2) for x in (q, pooled))
        correlations = queries @ cells.transpose(-2, -1) / width + self.pos()
        return (correlations @ cells).transpose(1, 2).flatten(2)

    def channel(self, q: Tensor, v: Tensor) -> Tensor:
        return (q.transpose(1, 2) @ v / self.window**2 @ v.transpose(1, 2)).transpose(1, 2)


#: Classes that replace ddsr's: same parameters, another forward pass.
WAYS: dict[str, dict[type[nn.Module], type[nn.Module]]] = {
    "ddsr": {},
    "explicit bias": {PositionBias: ExplicitBias},
    "equations": {PositionBias: ExplicitBias, Correlation: EquationsCorrelation},
}


def new_training(config: TrainSRConfig, way: str) -> State:
    """A new training state whose network is computed in one of the `WAYS`."""
    state = new_state(config, "cpu")
    for network in (state.network, state.ema):
        for module in network.modules():
            module.__class__ = WAYS[way].get(type(module), type(module))
    return state


def measure(
    config: TrainSRConfig, steps: int, clock: Callable[[], float]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """By way: seconds of each step, and the largest difference of its output from ddsr's before the first step."""
    plan, scale = plan_of(config), config.scale
    states = {way: new_training(config, way) for way in WAYS}
    generator = torch.Generator().manual_seed(0)
    lr = torch.rand(plan.batch_size, 3, plan.lr_patch_px, plan.lr_patch_px, generator=generator)
    with torch.no_grad():
        outputs = {way: state.ema(lr) for way, state in states.items()}
    differences = {way: (output - outputs["ddsr"]).abs().max().item() for way, output in outputs.items()}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(steps + 1):  # the first step warms up
        lr = torch.rand(lr.shape, generator=generator)
        hr = torch.rand(plan.batch_size, 3, *(side * scale for side in lr.shape[2:]), generator=generator)
        for way, state in states.items():
            started = clock()
            train_step(config, state, lr, hr, bf16=False)
            seconds[way].append(clock() - started)
            state.step += 1
    return {way: times[1:] for way, times in seconds.items()}, differences


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="hit-srf", help="hit-srf or hit-srf-small")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--patch", type=int, default=64, help="LR pixels")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: all threads' time, on a busy machine")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    config = TrainSRConfig(
        arch=options.network, iterations=10**6, batch_size=options.batch, lr_patch_px=options.patch, precision="fp32"
    )
    seconds, differences = measure(config, options.steps, clock)

    medians = {way: statistics.median(times) for way, times in seconds.items()}
    how = f"batch {options.batch}, LR {options.patch} px, {options.threads} threads"
    print(f"{options.network}, {how}; median of {options.steps} training steps ({options.clock} time)\n")
    print("| way | ms per step | ratio to ddsr | largest difference of outputs |\n|---|---|---|---|")
    for way, median in medians.items():
        print(f"| {way} | {median * 1e3:.0f} | {median / medians['ddsr']:.2f} | {differences[way]:.1e} |")


if __name__ == "__main__":
    main()
