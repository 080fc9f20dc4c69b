"""The evaluate flow: PSNR, SSIM and LPIPS of an SR network, or of bicubic, on a test set."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from ddsr_core.evaluation import evaluate as evaluation
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.imaging.images import photo_source
from ddsr_core.storage.remote_store import Home, open_store
from ddsr_core.storage.store import Manifest, Source
from flows.building import prefect_builder
from flows.cli.single_steps import weights_source
from tasks.stages import Gpu


@flow(name="evaluate")
def evaluate(
    test: Path,
    weights: Path | None = None,
    config: EvaluateConfig | None = None,
    home: Home = "ddsr-home",
    device: str = "auto",
    gpu: Gpu = "local",
) -> Manifest:
    """Measure an SR network.

    Args:
        test: folder of HR images, or with `HR/` and `LRx4/` in it.
        weights: weights file or train_sr folder; bicubic if not given.
        config: protocol.
        home: where artifacts are kept: a folder or s3://bucket/prefix.
        device: torch device; auto takes a GPU where there is one.
        gpu: where GPU stages run: here, or on the pool that `ddsr deploy` made for them.
    """
    inputs: dict[str, Source] = {"test": photo_source(test)}
    if weights is not None:
        inputs["weights"] = weights_source(weights)
    build = prefect_builder(open_store(home), device, gpu)
    return build(evaluation.STAGE, config or EvaluateConfig(), inputs, str(weights or "bicubic"))[0].manifest
