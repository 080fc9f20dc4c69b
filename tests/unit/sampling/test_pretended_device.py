"""Sampling, selection and restoration on a pretended CUDA device: no tensor left on the CPU, the numbers of the CPU."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from ddsr_core.config import Runtime
from ddsr_core.sampling import sample as sampling
from ddsr_core.sampling.config import SampleConfig
from tests.helpers.interruption import digests
from tests.helpers.pretended_device import pretended_cuda
from tests.helpers.sample_inputs import write_random_latents, write_teacher

CONFIG = SampleConfig(count=6, steps=3, oversample=2, batch_size=4, max_cosine=1.0, select="psnr_bic")
#: Embeddings are computed in bfloat16 on a GPU.
OF_EMBEDDINGS = {"nearest_patch_id_by_embedding", "max_embedding_cosine_to_train"}
VARIANTS: Mapping[str, dict[str, object]] = {
    "default": {},
    "as released": {"sampler": "ancestral", "guidance_scale": 4.0, "weights": "raw"},
    "UniPC in bf16, in tiles": {"sampler": "unipc", "precision": "bf16", "decode_tile_px": 32},
    "from real patches": {"strength": 0.5, "steps": 6},
    "with a teacher": {"sr_gain_share": 0.5, "detail_restoration": 0.5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_sampling_gives_the_bytes_of_the_cpu(inputs: dict[str, Path], tmp_path: Path, variant: str):
    config = CONFIG.model_copy(update=VARIANTS[variant])
    given = dict(inputs)
    if config.strength < 1:
        given["latents"] = write_random_latents(tmp_path / "latents", count=25)
    if config.needs_teacher:
        given["teacher"] = write_teacher(tmp_path / "teacher")
    sampling.run(config, **given, out=tmp_path / "cpu", runtime=Runtime())
    with pretended_cuda():
        sampling.run(config, **given, out=tmp_path / "cuda", runtime=Runtime(device="cuda"))
    images = [
        {name: digest for name, digest in digests(tmp_path / device).items() if name.endswith(".png")}
        for device in ("cpu", "cuda")
    ]
    assert images[0] == images[1]
    assert measured(tmp_path / "cuda") == measured(tmp_path / "cpu")


def measured(folder: Path) -> list[dict[str, object]]:
    """Rows of a set without what depends on embeddings."""
    rows = map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in OF_EMBEDDINGS} for row in rows]
