"""The evaluate flow: PSNR, SSIM and LPIPS of SR networks and of bicubic upscaling on a test set."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.pipeline.request import Gpu
from ddsr_core.pipeline.step_runs import EvaluateRequest, run_evaluation
from ddsr_core.storage.remote_store import Home, open_store
from ddsr_core.storage.stage import Manifest
from tasks.backend import prefect_backend
from tasks.recovery import refuse_endless_crashes


@flow(name="evaluate")
def evaluate(
    test: Path,
    weights: tuple[str, ...] = (),
    protocol: EvaluateConfig = EvaluateConfig(),  # noqa: B008 (frozen)
    run: str | None = None,
    home: Home = "ddsr-home",
    device: str = "auto",
    gpu: Gpu = "local",
) -> dict[str, Manifest]:
    """Measure SR networks, with bicubic upscaling for comparison.

    Args:
        test: Folder of HR images, or a folder that contains `HR/` and `LRx4/`.
        weights: Weights files or train_sr folders. Bicubic upscaling is always measured.
        protocol: Metrics and how they are measured.
        run: Name of the run below home/runs. Without it, evaluate and the test set.
        home: Folder or s3://bucket/prefix for artifacts and runs.
        device: Torch device, such as cpu or cuda:1. auto uses a GPU if there is one.
        gpu: Where GPU stages run: on this machine, or on the GPU work pool.
    """
    refuse_endless_crashes()
    request = EvaluateRequest(
        test=test, weights=weights, protocol=protocol, run=run, home=home, device=device, gpu=gpu
    )  # fmt: skip
    store = open_store(request.home)
    measured = run_evaluation(request, store, prefect_backend(request, store), wait=True)
    return {name: artifact.manifest for name, artifact in measured.items()}
