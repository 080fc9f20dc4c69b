"""Embeddings on a pretended CUDA device: no tensor left on the CPU, a wait per batch for its vectors."""

from pathlib import Path

import numpy as np
import pytest

from ddsr_core.config import Runtime
from ddsr_core.pseudo_labels import embeddings
from ddsr_core.pseudo_labels.config import EmbeddingsConfig
from ddsr_core.storage.vector_table import read_table
from tests.helpers.pretended_device import pretended_cuda
from tests.unit.pseudo_labels.test_embeddings import VGG, patches, tiny

__all__ = ["patches", "tiny"]


@pytest.mark.parametrize("backend", ["vgg16", "open_clip"])
def test_vectors_are_those_of_the_cpu_up_to_bfloat16(patches: Path, tiny: Path, tmp_path: Path, backend: str):
    config = VGG
    if backend == "open_clip":
        config = EmbeddingsConfig(backend="open_clip", model="tiny", weights=str(tiny), batch_size=4)
    embeddings.run(config, patches=patches, out=tmp_path / "cpu", runtime=Runtime())
    with pretended_cuda() as gpu:
        embeddings.run(config, patches=patches, out=tmp_path / "cuda", runtime=Runtime(device="cuda"))
        assert gpu.syncs
    (_, expected), (_, vectors) = read_table(tmp_path / "cpu"), read_table(tmp_path / "cuda")
    assert np.einsum("nd,nd->n", expected, vectors).min() > 0.99
