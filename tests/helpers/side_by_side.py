"""Parts of stages and SR networks side by side, in miniature, in a process of its own.

python -m tests.helpers.side_by_side PHOTOS HOME RUNNER
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ddsr_core.config import Runtime
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.imaging.photos import photo_source
from ddsr_core.pipeline.networks import NetworkJob, train_and_measure
from ddsr_core.pipeline.request import Execution
from ddsr_core.pipeline.stages import Build
from ddsr_core.pseudo_labels import embeddings, patches, scoring
from ddsr_core.pseudo_labels.config import EmbeddingsConfig, PatchesConfig
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.storage.store import InputRef, Store
from tests.helpers.commands import ROOT, digests

CUT = PatchesConfig(patch_px=32, stride_px=32)
VGG = EmbeddingsConfig(backend="vgg16", image_px=32, batch_size=4)
MEETING = "DDSR_TEST_MEETING"
MEETING_S = 240


class MeetingNet(nn.Sequential):
    """A tiny x4 network. Where $DDSR_TEST_MEETING names a folder, it waits there for one on another of Ray's nodes."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 48, 3, padding=1), nn.PixelShuffle(4))
        if MEETING in os.environ:
            meet(Path(os.environ[MEETING]))


def meet(folder: Path) -> None:
    import ray

    (folder / ray.get_runtime_context().get_node_id()).touch()
    until = time.monotonic() + MEETING_S
    while len(list(folder.iterdir())) < 2:
        if time.monotonic() > until:
            raise TimeoutError("no other node has come")
        time.sleep(0.05)


#: A network of the user's own, by the name that configs and weights files have for it.
OWN = "tests.helpers.side_by_side:MeetingNet"


def jobs_of(photos: Path, home: Path) -> list[NetworkJob]:
    source = InputRef.of(photo_source(photos))
    return [
        NetworkJob(
            label=f"seed {seed}", home=str(home), device="cpu", inputs={"data": source}, tests=source,
            recipe=TrainSRConfig(
                arch=OWN, iterations=2, batch_size=2, lr_patch_px=8, seed=seed
            ),
            evaluate=EvaluateConfig.model_validate({"lpips": False, "trust": [OWN]}),
        )
        for seed in range(2)
    ]  # fmt: skip


def build_stages(build: Build, photos: Path) -> None:
    cut, _ = build(patches.STAGE, CUT, {"photos": photo_source(photos)})
    build(embeddings.STAGE, VGG, {"patches": cut})


def build_here(photos: Path, home: Path) -> dict[str, str]:
    """The stages and networks in this process, on one thread as a worker; the digests."""
    threads, store = torch.get_num_threads(), Store(home)
    torch.set_num_threads(1)
    try:
        build_stages(lambda stage, config, inputs, label="": store.build(stage, config, inputs, Runtime()), photos)
        for job in jobs_of(photos, home):
            train_and_measure(job)
    finally:
        torch.set_num_threads(threads)
    return digests(home)


def run_on(photos: Path, home: Path, *runners: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The stages and networks as tasks on each runner, into a home each below ``home``, with a temporary server."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PREFECT_API_URL", "RAY_ADDRESS")}
    settings = {"PREFECT_HOME": str(home.parent / "prefect"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "tests.helpers.side_by_side", str(photos), str(home), *runners],
        cwd=ROOT, env={**inherited, **settings, **environment}, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip


def main(photos: Path, home: Path, *runners: str) -> None:
    """Print how far the progress of each stage went at a time: by parts of it."""
    from flows.cli.prefect_settings import apply_defaults
    from flows.cli.temporary_server import begin_server

    apply_defaults(home)
    server = begin_server(home)  # one for all: each process that knows of no server would start its own
    if server is not None:
        server.wait()
    from prefect import flow

    from tasks import progress
    from tasks.backend import prefect_backend

    scoring.PHOTOS_PER_PART, embeddings.PATCHES_PER_PART = 2, 16
    steps: dict[str, list[int]] = {}
    progress.current.set(partial(noted, steps))

    @flow
    def run(runner: Any) -> None:
        store = Store(home / runner)
        backend = prefect_backend(Execution(home=str(store.home), device="cpu", runner=runner, workers=2), store)
        build_stages(backend.build, photos)
        jobs = jobs_of(photos, store.home)
        if backend.networks is None:
            for job in jobs:
                train_and_measure(job)
        else:
            assert len(list(backend.networks(train_and_measure, jobs))) == len(jobs)

    for runner in runners:
        steps.clear()
        run(runner)
        print(runner, steps["Scoring photos"], steps["Embedding patches"])


@contextmanager
def noted(steps: dict[str, list[int]], title: str, **_: object) -> Iterator[Any]:
    """A `ProgressFactory` that keeps its steps."""
    taken = steps.setdefault(title, [])
    yield SimpleNamespace(advance=lambda amount=1: taken.append(amount), note=lambda text: None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
