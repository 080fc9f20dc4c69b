"""The evaluate flow: PSNR, SSIM and LPIPS of an SR network, or of bicubic upscaling, on a test set."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from ddsr_core.evaluation import evaluate as evaluation
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.imaging.photos import photo_source
from ddsr_core.pipeline.request import Execution, Gpu
from ddsr_core.pipeline.steps import weights_source
from ddsr_core.storage.remote_store import Home, open_store
from ddsr_core.storage.stage import Manifest, Source
from tasks.backend import prefect_backend


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
        test: Folder of HR images, or one with `HR/` and `LRx4/` in it.
        weights: Weights file or train_sr folder. Without it, bicubic upscaling is measured.
        config: Protocol.
        home: Folder or s3://bucket/prefix for artifacts.
        device: Torch device, such as cpu or cuda:1. auto takes a GPU if there is one.
        gpu: Where GPU stages run: on this machine, or on the GPU work pool.
    """
    inputs: dict[str, Source] = {"test": photo_source(test)}
    if weights is not None:
        inputs["weights"] = weights_source(weights)
    backend = prefect_backend(Execution(home=home, device=device, gpu=gpu), open_store(home))
    return backend.build(evaluation.STAGE, config or EvaluateConfig(), inputs, str(weights or "bicubic"))[0].manifest
