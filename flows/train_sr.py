"""The train-sr flow: one SR network on one data set."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from ddsr_core.baselines.names import TrainingSetName
from ddsr_core.imaging.kernel import Scale
from ddsr_core.pipeline.request import AtLeastOne, Gpu
from ddsr_core.pipeline.step_runs import Network, TrainRequest, run_training
from ddsr_core.pseudo_labels.names import EmbedderName
from ddsr_core.reporters import ReporterName
from ddsr_core.sr.config import Degradation, ValidationConfig
from ddsr_core.storage.remote_store import Home, open_store
from ddsr_core.storage.stage import Manifest
from tasks.backend import prefect_backend
from tasks.recovery import refuse_endless_crashes


@flow(name="train-sr")
def train_sr(
    data: Path,
    arch: Network = "edsr-small",
    training_set: TrainingSetName = "full",
    count: AtLeastOne = 70,
    patch_px: int = 64,
    embeddings: EmbedderName = "vgg16",
    iterations: AtLeastOne = 2000,
    scale: Scale = 4,
    degradation: Degradation = "bicubic",
    init: Path | None = None,
    test: Path | None = None,
    validation: ValidationConfig | None = None,
    overrides: tuple[str, ...] = (),
    run: str | None = None,
    home: Home = "ddsr-home",
    device: str = "auto",
    gpu: Gpu = "local",
    report_to: ReporterName | None = None,
) -> Manifest:
    """Train one SR network.

    Args:
        data: Folder of HR images, image set such as a run's `distilled/`, patches artifact, or Parquet.
        arch: Name of the network.
        training_set: Which part of the data to train on. full: all of it, unchanged.
        count: Number of crops, for training sets that are cut out of the data.
        patch_px: Height and width of these crops in pixels.
        embeddings: Features that k-center and hdc compare crops by.
        iterations: Optimizer steps. The paper's networks take 100,000 and more.
        scale: Upsampling factor.
        degradation: How LR images are made. real-esrgan: random blur, noise and JPEG, for unknown photos.
        init: Weights to start from: a train_sr folder, or a file of the same network and scale.
        test: Photos to validate on during training. The best weights are stored in addition to the last ones.
        validation: How to validate on the test photos. Without it, ten validations.
        overrides: Fields of the recipe to change, such as batch_size=8.
        run: Name of the run below home/runs. Without it, network and data.
        home: Folder or s3://bucket/prefix for artifacts and runs.
        device: Torch device, such as cpu or cuda:1. auto uses a GPU if there is one.
        gpu: Where GPU stages run: on this machine, or on the GPU work pool.
        report_to: Program that shows the training curves. Its files go to home/tracking.
    """
    refuse_endless_crashes()
    request = TrainRequest(
        data=data, arch=arch, training_set=training_set, count=count, patch_px=patch_px, embeddings=embeddings,
        iterations=iterations, scale=scale, degradation=degradation, init=init, test=test, validation=validation,
        overrides=overrides, run=run, home=home, device=device, gpu=gpu, report_to=report_to,
    )  # fmt: skip
    store = open_store(request.home)
    return run_training(request, store, prefect_backend(request, store), wait=True).weights.manifest
