"""Small SR networks side by side: which are small, and that their results are those of networks trained in turn."""

from __future__ import annotations

import pytest
import torch

from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.imaging.images import save_png
from ddsr_core.imaging.photos import photo_source
from ddsr_core.pipeline.config import PipelineConfig
from ddsr_core.pipeline.networks import (
    has_small_step,
    is_built,
    network_job,
    network_of,
    own_threads,
    prefetched,
    train_and_measure,
)
from ddsr_core.pipeline.plain import plain_backend
from ddsr_core.pipeline.request import Execution
from ddsr_core.pipeline.stages import Stages
from ddsr_core.planning.bench import textured
from ddsr_core.sr.config import GanConfig, TrainSRConfig
from ddsr_core.storage.store import Store
from tests.helpers.reporting import read_events

SMALL = TrainSRConfig(arch="edsr-small", iterations=3, batch_size=4, lr_patch_px=16)


@pytest.mark.parametrize(("recipe", "small"), [
    (SMALL, True),
    (TrainSRConfig(arch="srformer-small"), True),
    (TrainSRConfig(arch="edsr"), False),
    (TrainSRConfig(arch="edsr-small", arch_kwargs={"feat": 256}), False),
    (TrainSRConfig(arch="rrdbnet-small", gan=GanConfig(recipe="real-esrgan")), False),
    (TrainSRConfig(arch="tests.helpers.side_by_side:MeetingNet"), False),
])  # fmt: skip
def test_a_step_is_small_if_it_takes_few_flops(recipe, small):
    assert has_small_step(recipe) is small


def test_a_small_network_has_one_thread_wherever_it_is_trained():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with own_threads(SMALL, "cpu"):
            assert torch.get_num_threads() == 1
        with own_threads(TrainSRConfig(arch="edsr"), "cpu"):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_large_networks_are_not_trained_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr("ddsr_core.pipeline.plain.idle_cores", lambda: 2)
    backend = plain_backend(Execution(home=str(tmp_path), device="cpu"), Store(tmp_path))
    assert backend.networks is not None
    assert backend.only_small
    in_turn = plain_backend(Execution(home=str(tmp_path), device="cpu", side_by_side=False), Store(tmp_path))
    assert in_turn.networks is None


def test_networks_have_the_same_bytes_side_by_side_and_in_turn(tmp_path, monkeypatch):
    monkeypatch.setattr("ddsr_core.pipeline.plain.idle_cores", lambda: 2)
    photos = tmp_path / "photos"
    photos.mkdir()
    save_png(photos / "a.png", textured(96, 96))
    source, config = photo_source(photos), PipelineConfig(evaluate=EvaluateConfig(metrics=("psnr_y", "ssim_y")))
    before, digests = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for side_by_side in (True, False):
            store = Store(tmp_path / f"home-{side_by_side}")
            execution = Execution(home=str(store.home), device="cpu", side_by_side=side_by_side, report_to="tensorboard")
            stages = Stages(config, plain_backend(execution, store))
            recipes = [SMALL.model_copy(update={"seed": seed}) for seed in range(2)]
            jobs = [(network_job(stages, recipe, source, source, str(recipe.seed)), None) for recipe in recipes]
            built = [network_of(stages, job, source, source) for job, _ in prefetched(stages, jobs)]
            assert [run.cached for run in stages.runs] == [False] * 4  # built by this run, in either way
            digests.append([artifact.digest for pair in built for artifact in pair])
            for label, (weights, _) in zip(("0", "1"), built, strict=True):
                events = read_events(store.home / f"tracking/{label}-{weights.key[:8]}")
                assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    finally:
        torch.set_num_threads(before)
    assert digests[0] == digests[1]


def test_networks_from_the_cache_need_no_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("ddsr_core.pipeline.plain.idle_cores", lambda: 2)
    (tmp_path / "photos").mkdir()
    save_png(tmp_path / "photos/a.png", textured(96, 96))
    source, store = photo_source(tmp_path / "photos"), Store(tmp_path / "home")
    stages = Stages(
        PipelineConfig(evaluate=EvaluateConfig(metrics=("psnr_y",))),
        plain_backend(Execution(home=str(store.home), device="cpu"), store),
    )
    job = network_job(stages, SMALL, source, source, "edsr-small")
    assert not is_built(job)
    train_and_measure(job)
    assert is_built(job)
    monkeypatch.setattr("ddsr_core.pipeline.plain._executor", None)  # it would be called to start workers
    assert [item for item, _ in prefetched(stages, [(job, None)])] == [job]
    with pytest.raises(TypeError):
        list(
            prefetched(
                stages, [(job, None), (job.model_copy(update={"recipe": SMALL.model_copy(update={"seed": 9})}), None)]
            )
        )
