"""Fine-tuning that continues from an earlier adapter."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from ddsr_core.config import Runtime
from ddsr_core.diffusion import finetune
from ddsr_core.diffusion.config import FinetuneConfig
from ddsr_core.diffusion.difffit import ROWS, load_adapter
from ddsr_core.diffusion.from_adapter import match_labels
from ddsr_core.errors import InputError
from tests.helpers.tiny_base import write_base, write_clusters, write_latents, write_patches

CONFIG = FinetuneConfig(steps=4, epochs=None, batch_size=6, gamma_blocks=2, memory_size=5, lsr_mode="off")


def put_centroids(clusters: Path, order: list[int]) -> Path:
    buffer = io.BytesIO()
    np.save(buffer, np.eye(3, dtype=np.float32)[order])
    (clusters / "centroids.npy").write_bytes(buffer.getvalue())
    return clusters


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    base = write_base(tmp_path / "base")
    latents = write_latents(tmp_path / "latents", write_patches(tmp_path / "patches"), base)
    return {"latents": latents, "base": base, "clusters": put_centroids(write_clusters(tmp_path / "clusters"), [0, 1, 2])}


def test_with_no_steps_the_earlier_adapter_comes_back_with_rows_for_the_new_labels(inputs: dict[str, Path], tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    finetune.run(CONFIG, **inputs, out=first, runtime=Runtime())
    permuted = put_centroids(write_clusters(tmp_path / "permuted"), [2, 0, 1])
    idle = CONFIG.model_copy(update={"steps": 0})
    new = {**inputs, "clusters": permuted, "from_adapter": first, "from_clusters": inputs["clusters"]}
    finetune.run(idle, **new, out=second, runtime=Runtime())
    old, got = load_adapter(first), load_adapter(second, "raw")
    assert torch.equal(got.tensors[ROWS], old.tensors[ROWS][[2, 0, 1, 3]])
    assert all(torch.equal(got.tensors[name], old.tensors[name]) for name in old.tensors if name != ROWS)
    assert all(torch.equal(load_adapter(second).tensors[name], got.tensors[name]) for name in got.tensors)


def test_training_continues_from_there(inputs: dict[str, Path], tmp_path: Path):
    finetune.run(CONFIG, **inputs, out=tmp_path / "first", runtime=Runtime())
    earlier = {"from_adapter": tmp_path / "first", "from_clusters": inputs["clusters"]}
    finetune.run(CONFIG, **inputs, **earlier, out=tmp_path / "second", runtime=Runtime())
    old, new = load_adapter(tmp_path / "first", "raw"), load_adapter(tmp_path / "second", "raw")
    assert any(not torch.equal(old.tensors[name], new.tensors[name]) for name in old.tensors if "gamma" in name)


def test_what_does_not_fit_is_refused(inputs: dict[str, Path], tmp_path: Path):
    finetune.run(CONFIG, **inputs, out=tmp_path / "first", runtime=Runtime())
    earlier = {"from_adapter": tmp_path / "first", "from_clusters": inputs["clusters"]}
    other = CONFIG.model_copy(update={"gamma_blocks": 3})
    with pytest.raises(InputError, match="scales in 2 blocks, not 3"):
        finetune.run(other, **inputs, **earlier, out=tmp_path / "second", runtime=Runtime())
    with pytest.raises(InputError, match="cannot be matched"):
        match_labels(np.zeros((3, 4)), np.zeros((2, 4)))
