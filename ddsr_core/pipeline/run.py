"""One run from request to report. Prefect's flow and the plain run differ in how a stage is built, and in nothing else."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ddsr_core.errors import ConfigError
from ddsr_core.imaging.hold_out import hold_out
from ddsr_core.imaging.photos import photo_digests, source_digest
from ddsr_core.pipeline.config import PipelineConfig
from ddsr_core.pipeline.distill import Comparison, compare, distill
from ddsr_core.pipeline.pins import Pins
from ddsr_core.pipeline.plain import plain_backend
from ddsr_core.pipeline.preflight import check_request, notices_of
from ddsr_core.pipeline.request import Execution, RunRequest
from ddsr_core.pipeline.run_folder import free_name
from ddsr_core.pipeline.run_state import Outcome, failure_noted, finish_run, run_log, start_run
from ddsr_core.pipeline.stages import Backend, Distilled, Stages
from ddsr_core.progress import ProgressFactory, silent
from ddsr_core.storage.remote_store import RemoteStore, open_store
from ddsr_core.storage.stage import Source
from ddsr_core.storage.store import Store

LOG = logging.getLogger("ddsr.preflight")


@dataclass(frozen=True)
class Run:
    """A run that has begun.

    Attributes:
        photos: the training photos, hashed.
        tests: the test photos, hashed; None if there are none and no SR network is to be trained.
        stages: builds its stages and notes what it has built.
        pins: protect its artifacts from `ddsr gc` until it is finished.
    """

    name: str
    store: Store
    photos: Source
    tests: Source | None
    stages: Stages
    pins: Pins

    @property
    def test_photos(self) -> Source:
        """The test photos of a run that cannot do without.

        Raises:
            ConfigError: there are none.
        """
        if self.tests is None:
            raise ConfigError("test photos are needed", where="test", fix="name them with --test, and name SR networks")
        return self.tests

    def compare(self, distilled: Distilled) -> Comparison | None:
        """`ddsr_core.pipeline.distill.compare`, if the config names SR networks."""
        return compare(self.stages, distilled, self.tests) if self.tests and self.stages.config.sr.archs else None

    def finish(self, distilled: Distilled, comparison: Comparison | None) -> Outcome:
        """Write what the run has to show."""
        outcome = finish_run(self.store, self.name, self.stages, distilled, comparison)
        self.pins.drop()
        return outcome


def run_plainly(request: RunRequest, progress: ProgressFactory = silent) -> Outcome:
    """A whole run without Prefect.

    Raises:
        DdsrError: whatever goes wrong; run.json says so, too, and the next run of the same request continues.
    """
    store = open_store(request.home)
    with open_run(request, store, plain_backend(request, store, progress, request.run_name)) as run:
        distilled = distill(run.stages, run.photos)
        return run.finish(distilled, run.compare(distilled))


@contextmanager
def open_run(request: RunRequest, store: Store, backend: Backend, *, wait: bool = False) -> Iterator[Run]:
    """Begin a run: its config, photos, run folder and pins. If it stops before its end, run.json says why.

    Args:
        wait: until another command that works on the same run has ended; otherwise, this is an error.

    Raises:
        ConfigError: a wrong name or config, a name that other photos have, or photos that cannot be split.
        InputError: no photos, or no weights.
        StorageError: the home cannot be written, or another command works on the run; the message says which.
    """
    config = check_request(request, store)
    photos, tests, notices = photos_of(request, config, store)
    identity = {"kind": request.kind, "photos_digest": photos.digest, "tests_digest": tests.digest if tests else None}
    name = free_name(store, request.run_name, identity, chosen=request.run is not None)
    with store.locked(f"locks/run-{name}", name, f"the run {name!r}, begun", wait=wait), failure_noted(store, name):
        start_run(store, name, config, photos.path, tests.path if tests else None, identity)
        pins = Pins(store, name)
        stages = Stages(config, pins.over(backend), run_log(store, name))
        stages.files.all_of(config)  # missing weights are found before any work is done
        for notice in notices:
            stages.log(notice)
            LOG.warning(notice)
        yield Run(name, store, photos, tests, stages, pins)


def photos_of(request: RunRequest, config: PipelineConfig, store: Store) -> tuple[Source, Source | None, tuple[str, ...]]:
    """Training and test photos, each hashed once. If the request names no test photos, one photo in ten is held out.

    Returns:
        ``(photos, tests, notices)``; without named tests, none if no SR network is to be trained.

    Raises:
        ConfigError: the photos cannot be split, or would be split by links on this machine that other machines do not see.
        InputError: there are no photos.
    """
    if request.test is None and config.sr.archs:
        require_one_machine(request, store)
        return *hold_out(request.images, store.home), ()
    photos = photo_digests(request.images)
    tests = [] if request.test is None else photo_digests(request.test)
    sources = (Source(path.expanduser(), source_digest(digests)) for path, digests in
               ((request.images, photos), (request.test or request.images, tests)))  # fmt: skip
    train, test = sources
    return train, None if request.test is None else test, notices_of(config, photos, tests)


def require_one_machine(execution: Execution, store: Store) -> None:
    """Make sure that links on this machine are enough.

    Raises:
        ConfigError: other machines take part.
    """
    if isinstance(store, RemoteStore) and (execution.gpu == "pool" or execution.runner == "ray"):
        raise ConfigError(
            "test photos cannot be held out for several machines with a home on S3", where="test",
            fix="name test photos, in a folder that has the same path on all of them",
        )  # fmt: skip
