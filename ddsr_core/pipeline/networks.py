"""SR networks of a run as plain jobs, which other processes can train and measure in parallel if the run has workers.

Without Prefect they go to processes of this machine (`ddsr_core.pipeline.plain`), under Prefect to the runner of the run
(`tasks.networks`). The run then finds their artifacts in the store.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from pydantic import BaseModel, ConfigDict

from ddsr_core.config import Runtime, resolve_device
from ddsr_core.evaluation import evaluate
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.pipeline.stages import Stages, trusting
from ddsr_core.reporters import Tracking, tracked
from ddsr_core.sr import train_sr
from ddsr_core.sr.architectures import find_architecture
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.plan import plan_of
from ddsr_core.storage.remote_store import open_store
from ddsr_core.storage.stage import Artifact, StageInput
from ddsr_core.storage.store import InputRef

T = TypeVar("T")
#: Below this, a second thread hardly speeds up a step. EDSR-small and SRFormer-small of the demo take 6 and 12 GFLOP,
#: EDSR 440.
SMALL_STEP_FLOPS = 3e10


class NetworkJob(BaseModel):
    """One SR network to train and measure: everything that another process needs to know.

    Attributes:
        inputs: of the training stage.
        tests: the test photos.
        tracking: where the curves are shown.
    """

    model_config = ConfigDict(frozen=True)
    label: str
    home: str
    device: str
    recipe: TrainSRConfig
    inputs: dict[str, InputRef]
    evaluate: EvaluateConfig
    tests: InputRef
    tracking: Tracking | None = None

    @property
    def key(self) -> str:
        """Of the training's artifact."""
        return train_sr.STAGE.key(self.recipe, self.inputs)


def network_job(stages: Stages, recipe: TrainSRConfig, images: StageInput, tests: StageInput, label: str) -> NetworkJob:
    """The job of one network of a run."""
    inputs = stages.training_inputs(recipe, images)
    return NetworkJob(
        label=label, home=stages.backend.home, device=stages.backend.device, recipe=recipe,
        evaluate=trusting(stages.config.evaluate, recipe.arch),
        inputs={name: InputRef.of(item) for name, item in inputs.items()}, tests=InputRef.of(tests),
        tracking=stages.backend.tracking(label, train_sr.STAGE.key(recipe, inputs)),
    )  # fmt: skip


def train_and_measure(job: NetworkJob) -> None:
    """Build both artifacts of a job. Existing artifacts are reused."""
    store = open_store(job.home)
    runtime = Runtime(device=resolve_device(job.device), run=job.label, reporter=tracked(job.tracking, store.home))
    inputs = {name: ref.source(store) for name, ref in job.inputs.items()}
    with own_threads(job.recipe, runtime.device):
        weights, _ = store.build(train_sr.STAGE, job.recipe, inputs, runtime)
        store.build(evaluate.STAGE, job.evaluate, {"weights": weights, "test": job.tests.source(store)}, runtime)


def is_built(job: NetworkJob) -> bool:
    """Whether both artifacts of a job exist."""
    store = open_store(job.home)
    weights = store.find(train_sr.STAGE.name, job.key)
    if weights is None:
        return False
    inputs: dict[str, StageInput] = {"weights": weights, "test": job.tests.source(store)}
    return store.find(evaluate.STAGE.name, evaluate.STAGE.key(job.evaluate, inputs)) is not None


def has_small_step(recipe: TrainSRConfig) -> bool:
    """Whether a training step is so small that a second thread hardly helps: below about `SMALL_STEP_FLOPS`.

    Forward and backward of a network that works at the resolution of its LR crops take six FLOPs per weight and LR pixel.
    """
    params = find_architecture(recipe.arch).params
    if params is None or recipe.arch_kwargs or recipe.gan:
        return False
    plan = plan_of(recipe)
    return 6.0 * params * plan.batch_size * plan.lr_patch_px**2 < SMALL_STEP_FLOPS


@contextmanager
def own_threads(recipe: TrainSRConfig, device: str) -> Iterator[None]:
    """One thread for a network with a small step on a CPU: the sums are the same side by side and in turn."""
    if device != "cpu" or not has_small_step(recipe):
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prefetched(stages: Stages, jobs: Iterable[tuple[NetworkJob, T]]) -> Iterator[tuple[NetworkJob, T]]:
    """The jobs in order. With workers, a job is yielded once its network is trained; without, when it is to be trained.

    Args:
        jobs: pairs of a job and any value that belongs to it.
    """
    networks = stages.backend.networks
    known = list(jobs)
    too_large = stages.backend.only_small and not all(has_small_step(job.recipe) for job, _ in known)
    if networks is None or too_large or all(is_built(job) for job, _ in known):  # starting workers takes seconds
        yield from known
        return
    done = networks(train_and_measure, [job for job, _ in known])
    for item, _ in zip(known, done, strict=True):
        yield item


def network_of(stages: Stages, job: NetworkJob, images: StageInput, tests: StageInput) -> tuple[Artifact, Artifact]:
    """The network of a job and its evaluation, built here unless a worker has built them; noted as stages of the run."""
    with own_threads(job.recipe, stages.backend.device):
        weights = stages.train_sr(job.recipe, images, job.label)
        return weights, stages.evaluate(tests, weights, job.label)
