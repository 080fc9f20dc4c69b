"""One run from request to report. Prefect's flow and the plain run differ in how a stage is built, and in nothing else."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ddsr_core.errors import ConfigError
from ddsr_core.imaging.hold_out import hold_out, keep_apart
from ddsr_core.imaging.photos import photo_digests, source_digest
from ddsr_core.pipeline.config import PipelineConfig, to_toml
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
        left_out: number of training photos that are left out because they are also test photos.
    """

    name: str
    store: Store
    photos: Source
    tests: Source | None
    stages: Stages
    pins: Pins
    left_out: int = 0

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


@dataclass(frozen=True)
class PhotoSets:
    """The photos of a run, each hashed once.

    Attributes:
        train: training photos.
        tests: test photos; None if there are none and no SR network is to be trained.
        images: what run.json calls the training photos.
        left_out: number of photos that are not among ``train`` because they are also test photos.
        notices: what a user should know about them.
    """

    train: Source
    tests: Source | None
    images: Path
    left_out: int = 0
    notices: tuple[str, ...] = ()


@contextmanager
def open_run(request: RunRequest, store: Store, backend: Backend, *, wait: bool = False) -> Iterator[Run]:
    """Begin a run: its config, photos, run folder and pins. If it stops before its end, run.json says why.

    Args:
        wait: until another command that works on the same run has ended; otherwise, this is an error.

    Raises:
        ConfigError: a wrong name or config, a name that other photos have, photos that cannot be split, or the same photos
            for training and testing.
        InputError: no photos, or no weights.
        StorageError: the home cannot be written, or another command works on the run; the message says which.
    """
    config = check_request(request, store)
    sets = photos_of(request, config, store)
    photos, tests = sets.train, sets.tests
    identity = {"kind": request.kind, "photos_digest": photos.digest, "tests_digest": tests.digest if tests else None}
    settings = hashlib.sha256(to_toml(config).encode()).hexdigest()
    name = free_name(store, request.run_name, identity, chosen=request.run is not None, config_digest=settings)
    with store.locked(f"locks/run-{name}", name, f"the run {name!r}, begun", wait=wait), failure_noted(store, name):
        start_run(store, name, config, sets.images, tests.path if tests else None, identity, left_out=sets.left_out)
        pins = Pins(store, name)
        stages = Stages(config, pins.over(backend), run_log(store, name))
        stages.files.all_of(config)  # missing weights are found before any work is done
        give_notice(stages, sets.notices)
        yield Run(name, store, photos, tests, stages, pins, sets.left_out)


def give_notice(stages: Stages, notices: Iterable[str]) -> None:
    """Say on the terminal and in the log of the run what a user should know before its results are believed."""
    for notice in notices:
        stages.log(notice)
        LOG.warning(notice)


def photos_of(request: RunRequest, config: PipelineConfig, store: Store) -> PhotoSets:
    """Training and test photos without a common picture. Without named test photos, one photo in ten is held out.

    Raises:
        ConfigError: the photos cannot be split, all of them are test photos, or they would be separated by links on this
            machine that other machines do not see.
        InputError: there are no photos.
    """
    if request.test is None and config.sr.archs:
        require_one_machine(request, store)
        train, tests = hold_out(request.images, store.home)
        return PhotoSets(train, tests, train.path)
    images = request.images.expanduser()
    if request.test is None:
        photos = photo_digests(request.images)
        return PhotoSets(Source(images, source_digest(photos)), None, images, 0, notices_of(config, photos, ()))
    apart = keep_apart(request.images, request.test, store.home)
    if apart.left_out:
        require_one_machine(request, store, len(apart.left_out))
    notices = notices_of(config, apart.photos, apart.tests, apart.left_out)
    return PhotoSets(apart.train, apart.test, images, len(apart.left_out), notices)


def require_one_machine(execution: Execution, store: Store, left_out: int = 0) -> None:
    """Make sure that links on this machine are enough to separate training and test photos.

    Args:
        left_out: number of training photos that are also test photos; 0: test photos are held out.

    Raises:
        ConfigError: other machines take part.
    """
    if not isinstance(store, RemoteStore) or (execution.gpu != "pool" and execution.runner != "ray"):
        return
    what = f"{left_out} training photos are also test photos; they" if left_out else "test photos"
    fix = ("remove them from the training photos" if left_out
           else "name test photos, in a folder that has the same path on all of them")  # fmt: skip
    done = "left out" if left_out else "held out"
    raise ConfigError(f"{what} cannot be {done} for several machines with a home on S3", where="test", fix=fix)
