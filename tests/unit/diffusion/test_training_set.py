"""Batches: label dropout, flips, epochs."""

from pathlib import Path

import pytest
import torch

from ddsr_core.diffusion.training_set import patches_of_step
from tests.helpers.tiny_base import SHAPE
from tests.helpers.tiny_finetuning import draw, load_inputs


def test_labels_are_dropped_once_per_sample_and_the_memories_still_see_them(inputs: dict[str, Path], tmp_path: Path):
    _, data = load_inputs(inputs)
    batch = draw(data, size=4000, label_dropout=0.25)
    dropped = batch.y == SHAPE.null_row
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(batch.y[~dropped], batch.labels[~dropped])
    assert batch.labels.max() == 2
    assert not (draw(data, size=500, label_dropout=0.0).y == SHAPE.null_row).any()


def test_both_flips_are_encoded_and_used(inputs: dict[str, Path], tmp_path: Path):
    _, data = load_inputs(inputs)
    mean = torch.from_numpy(data.latents.mean[:].copy())
    assert mean.shape == (2, 24, 4, 4, 4)
    assert not torch.equal(mean[0], mean[1])
    chosen = patches_of_step(24, 0, 24, 0)

    def mirrored(flip: bool) -> list[bool]:
        return [
            bool(torch.equal(x, mean[1, i].float())) for x, i in zip(draw(data, size=24, flip=flip).x0, chosen, strict=True)
        ]

    assert 4 < sum(mirrored(True)) < 20
    assert not any(mirrored(False))


@pytest.mark.parametrize(("count", "size"), [(10, 4), (3, 8), (7, 7)])
def test_every_patch_comes_once_per_epoch(count: int, size: int):
    steps = 3 * count  # size whole epochs of it, three times
    drawn = torch.cat([patches_of_step(count, step, size, seed=1) for step in range(steps)])
    epochs = drawn.reshape(-1, count)
    assert all(epoch.sort().values.tolist() == list(range(count)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1]) or count < 4
