"""The reproduce flow: experiments on the method, as tasks that other runs can share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from ddsr_core.errors import DdsrError
from ddsr_core.pipeline import PipelineConfig, load_config
from ddsr_core.store import Store
from flows.building import prefect_builder
from flows.experiment import ablation, finish
from flows.runs import fail_run, run_log


@flow(name="reproduce")
def reproduce(
    images: Path,
    test: Path,
    experiment: Literal["ablation"] = "ablation",
    preset: str = "demo",
    config: PipelineConfig | None = None,
    seeds: int = 3,
    home: Path = Path("ddsr-home"),
    run: str | None = None,
    device: str = "auto",
    command: str = "the flow `reproduce`",
) -> dict[str, Any]:
    """Measure the parts of the method, or its tables, seed by seed.

    Args:
        images: training photos: a folder, Parquet with an image column, or a glob pattern.
        test: test photos.
        experiment: what is measured.
        preset: demo, released, paper or best; ignored where `config` is given.
        config: every stage's config.
        seeds: how many seeds, from 0.
        home: where artifacts and runs are kept.
        run: name of the run below `home/runs`; the experiment's name if not given.
        device: torch device; auto takes a GPU where there is one.
        command: how the run was started; stands above the table.
    """
    config, store, name = config or load_config(preset), Store(home), run or experiment
    try:
        done = ablation(
            config, images, test, seeds, store, name, prefect_builder(store, device), run_log(store, name), command
        )
    except DdsrError as error:
        fail_run(store, name, str(error))
        raise
    create_markdown_artifact(done.markdown(), key=experiment, description=done.about)
    return finish(store, name, done)
