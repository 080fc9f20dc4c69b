"""SR networks of a run, trained and measured at once where the run has workers: plain jobs that another process can do.

Without Prefect they go to processes of this machine (`ddsr_core.pipeline.plain`), under Prefect to the runner of the run
(`tasks.networks`). What they build is found again when the run asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from ddsr_core.config import Runtime, resolve_device
from ddsr_core.evaluation import evaluate
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.pipeline.stages import Stages
from ddsr_core.sr import train_sr
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.storage.remote_store import open_store
from ddsr_core.storage.stage import Artifact, StageInput
from ddsr_core.storage.store import InputRef

T = TypeVar("T")


class NetworkJob(BaseModel):
    """One SR network to train and measure: everything that another process needs to know.

    Attributes:
        inputs: of the training stage.
        tests: the test photos.
    """

    model_config = ConfigDict(frozen=True)
    label: str
    home: str
    device: str
    recipe: TrainSRConfig
    inputs: dict[str, InputRef]
    evaluate: EvaluateConfig
    tests: InputRef

    @property
    def key(self) -> str:
        """Of the training's artifact."""
        return train_sr.STAGE.key(self.recipe, self.inputs)


def network_job(stages: Stages, recipe: TrainSRConfig, images: StageInput, tests: StageInput, label: str) -> NetworkJob:
    """The job of one network of a run."""
    inputs = stages.training_inputs(recipe, images)
    return NetworkJob(
        label=label, home=stages.backend.home, device=stages.backend.device, recipe=recipe,
        evaluate=stages.config.evaluation,
        inputs={name: InputRef.of(item) for name, item in inputs.items()}, tests=InputRef.of(tests),
    )  # fmt: skip


def train_and_measure(job: NetworkJob) -> None:
    """Build both artifacts of a job; what is already there stays as it is."""
    store = open_store(job.home)
    runtime = Runtime(device=resolve_device(job.device), run=job.label)
    inputs = {name: ref.source(store) for name, ref in job.inputs.items()}
    weights, _ = store.build(train_sr.STAGE, job.recipe, inputs, runtime)
    store.build(evaluate.STAGE, job.evaluate, {"weights": weights, "test": job.tests.source(store)}, runtime)


def prefetched(stages: Stages, jobs: Iterable[tuple[NetworkJob, T]]) -> Iterator[tuple[NetworkJob, T]]:
    """The jobs in their order, each when its network is trained, or, without workers, when its turn to be trained comes.

    Args:
        jobs: with whatever belongs to each.
    """
    networks = stages.backend.networks
    if networks is None:
        yield from jobs
        return
    known = list(jobs)
    done = networks(train_and_measure, [job for job, _ in known])
    for item, _ in zip(known, done, strict=True):
        yield item


def network_of(stages: Stages, job: NetworkJob, images: StageInput, tests: StageInput) -> tuple[Artifact, Artifact]:
    """The network of a job and its evaluation, built here unless a worker has built them; noted as stages of the run."""
    weights = stages.train_sr(job.recipe, images, job.label)
    return weights, stages.evaluate(tests, weights, job.label)
