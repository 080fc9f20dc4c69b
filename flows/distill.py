"""The distill flow: a folder of photos in, a distilled set, trained SR networks and a report out."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from ddsr_core.errors import ConfigError
from ddsr_core.imaging.hold_out import hold_out
from ddsr_core.pipeline.config import PipelineConfig, Preset, chosen_config
from ddsr_core.pipeline.pins import Pins
from ddsr_core.pipeline.runs import Outcome, check_run_name, failure_noted, finish_run, run_log, start_run
from ddsr_core.pipeline.stages import distill_and_train
from ddsr_core.storage.remote_store import Home, RemoteStore, open_store
from ddsr_core.storage.store import Store
from flows.building import prefect_builder
from flows.train_networks import networks_ahead
from tasks.recovery import refuse_endless_crashes
from tasks.run_pages import publish_run
from tasks.stages import Gpu
from tasks.task_runners import AtLeastOne, Runner


@flow(name="distill")
def distill(
    images: Path,
    test: Path | None = None,
    preset: Preset = "demo",
    config: PipelineConfig | None = None,
    home: Home = "ddsr-home",
    run: str | None = None,
    device: str = "auto",
    gpu: Gpu = "local",
    runner: Runner = "sequential",
    workers: AtLeastOne = 2,
    overrides: tuple[str, ...] = (),
) -> Outcome:
    """Distill a folder of photos and compare SR networks trained on the result.

    Args:
        images: training photos: a folder, Parquet with an image column, or a glob pattern.
        test: test photos; without it one photo in ten is held out.
        preset: demo, released, paper or best; ignored where `config` is given and changed.
        config: every stage's config; one that is left as it is by default counts as none.
        home: where artifacts and runs are kept: a folder or s3://bucket/prefix.
        run: name of the run below `home/runs`; the preset's name if not given.
        device: torch device; auto takes a GPU where there is one.
        gpu: where GPU stages run: here, or on the pool that `ddsr deploy` made for them.
        runner: where photos are scored, patches embedded and SR networks trained: in the run itself, one by one; in threads
            (but networks one by one) or processes of its machine; or on Ray. What goes to the pool for GPUs goes there.
        workers: how many of them at once, where it is not one by one.
        overrides: single fields laid over the preset or over `config`, such as sample.count=140.
    """
    refuse_endless_crashes()
    config = chosen_config(preset, config, overrides)
    store, name = open_store(home), run or config.preset
    check_run_name(name)
    if test is None and config.sr.archs:
        require_one_machine(store, gpu, runner)
        images, test = hold_out(images, store.home)
    start_run(store, name, config, images, test)
    with failure_noted(store, name):
        pins = Pins(store, name)
        build = pins.building(prefect_builder(store, device, gpu, runner=runner, workers=workers))
        ahead = networks_ahead(store, config, device, runner, workers, gpu, pins.add)
        chain = distill_and_train(config, images, test, build, run_log(store, name), ahead)
        outcome = finish_run(store, name, config, chain)
    pins.drop()
    publish_run(name, outcome.table, outcome.stages, store.url)
    return outcome


def require_one_machine(store: Store, gpu: Gpu, runner: Runner) -> None:
    """
    Raises:
        ConfigError: photos would be held out by links on this machine that another one does not see.
    """
    if isinstance(store, RemoteStore) and (gpu == "pool" or runner == "ray"):
        raise ConfigError(
            "test photos cannot be held out for several machines with a home on S3", where="test",
            fix="name test photos, in a folder that is at the same path on all of them",
        )  # fmt: skip
