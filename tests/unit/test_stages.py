"""The one list of stages, and what is made from it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ddsr_core.diffusion.base import CLASSES
from ddsr_core.errors import ConfigError
from ddsr_core.pipeline.config import PipelineConfig, load_config
from ddsr_core.pipeline.distill import distill
from ddsr_core.pipeline.model_files import ModelFiles
from ddsr_core.pipeline.plain import plain_backend
from ddsr_core.pipeline.request import Execution
from ddsr_core.pipeline.stages import Backend, Stages
from ddsr_core.stages import STAGES, find_stage
from ddsr_core.storage.stage import Artifact, Manifest, Source, Stage
from ddsr_core.storage.store import Store
from flows import distill as flow_module
from tasks.stages import TASKS
from tests.helpers.tiny_base import SHAPE, write_base
from tests.helpers.toy_stage import TOY, CountConfig


def test_stages_stand_in_the_order_of_the_paper():
    paper = ["patches", "embeddings", "clusters", "latents", "class_rows", "finetune", "sample", "crops", "restore",
             "subset", "gsdd", "train_sr", "evaluate"]  # fmt: skip
    assert [name for name in STAGES if name in paper] == paper
    sections = [stage.section for stage in STAGES.values()]
    assert sections == sorted(sections, key=["II-A", "II-B", "II-C", "III"].index)


def test_every_stage_has_a_task_of_its_name_and_version():
    assert {name: task.version for name, task in TASKS.items()} == {s.name: str(s.version) for s in STAGES.values()}


def test_a_stage_is_named_like_its_config_field():
    """Of the others, ``train_sr`` has several recipes, and a run fills in what to cut."""
    unnamed = set(STAGES) - set(PipelineConfig.model_fields)
    assert {"train_sr", "crops", "subset"} <= unnamed
    for name in set(STAGES) - unnamed:
        assert PipelineConfig.model_fields[name].annotation is STAGES[name].config


def test_an_unknown_stage_is_an_error_that_lists_them():
    with pytest.raises(ConfigError, match="finetune"):
        find_stage("finetun")


def test_a_new_stage_is_built_like_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The line of a new stage, and its module `tests.helpers.toy_stage`."""
    monkeypatch.setitem(STAGES, "toy", TOY)
    backend = plain_backend(Execution(home=str(tmp_path), device="cpu"), Store(tmp_path))
    stages = Stages(load_config("demo"), backend)
    (tmp_path / "source").write_text("")
    inputs = {"source": Source(tmp_path / "source", "digest")}
    built = stages.build(find_stage("toy"), CountConfig(files=2), inputs)
    assert sorted(path.name for path in built.path.glob("*.txt")) == ["0.txt", "1.txt"]
    stages.build(find_stage("toy"), CountConfig(files=2), inputs)
    assert [(run.label, run.cached) for run in stages.runs] == [("toy", False), ("toy", True)]


def fake_build(stage: Stage, config: Any, inputs: Mapping[str, Any], label: str = "") -> tuple[Artifact, bool]:
    """An artifact that was never built; its digest tells its inputs."""
    key = stage.key(config, inputs)
    manifest = Manifest(
        stage=stage.name, key=key, digest=key, stage_version=1, config={}, parents={}, counts={}, files={}, bytes=0,
        created="", seconds=0, device="cpu",
    )  # fmt: skip
    return Artifact(manifest, Path(key)), False


def fake_stages(config: PipelineConfig) -> Stages:
    return Stages(config, Backend(fake_build, "home"))


def test_the_flow_builds_what_the_library_builds(monkeypatch: pytest.MonkeyPatch):
    config, photos = load_config("demo"), Source(Path("photos"), "digest")
    library = fake_stages(config)
    distill(library, photos)

    flow = fake_stages(config)
    run = SimpleNamespace(photos=photos, stages=flow, compare=lambda distilled: None, finish=lambda *_: done)
    done = SimpleNamespace(run="r", table=[], stages=[])

    @contextmanager
    def open_run(*_: Any, **__: Any) -> Any:
        yield run

    monkeypatch.setattr(flow_module, "open_run", open_run)
    monkeypatch.setattr(flow_module, "publish_run", lambda *_: None)
    monkeypatch.setattr(flow_module, "refuse_endless_crashes", lambda: None)
    monkeypatch.setattr(flow_module, "prefect_backend", lambda *_: None)
    monkeypatch.setattr(flow_module, "require_ready", lambda *_: None)
    flow_module.distill.fn(images=Path("photos"))
    assert [item.artifact.key for item in flow.runs] == [item.artifact.key for item in library.runs]
    assert [item.label for item in flow.runs][-1] == "sample"


@pytest.mark.parametrize("centers", [True, False])
def test_fine_tuning_starts_at_the_nearest_classes_if_the_base_has_centers(centers: bool, tmp_path: Path):
    base = write_base(tmp_path / "base")
    if centers:
        save_file({"centers": torch.zeros(SHAPE.classes, 512)}, base / CLASSES)

    def built(init: str) -> list[str]:
        stages = fake_stages(load_config("demo", overrides=[f"base={base}", f"finetune.class_row_init={init}"]))
        distill(stages, Source(Path("photos"), "digest"))
        return [run.artifact.manifest.stage for run in stages.runs]

    assert ("class_rows" in built("auto")) is centers
    assert "class_rows" in built("nearest_classes")  # the stage says what is missing
    assert "class_rows" not in built("null")


def test_model_files_are_hashed_once(monkeypatch: pytest.MonkeyPatch):
    from ddsr_core.pipeline import model_files

    calls: list[str] = []

    def base_source(name: str) -> Source:
        calls.append(name)
        return Source(Path(name), name)

    monkeypatch.setattr(model_files, "base_source", base_source)
    files = ModelFiles()
    config = load_config("demo")
    assert files.base(config) == files.base(config.model_copy(update={"finetune": config.finetune}))
    assert calls == [config.base]


def test_what_a_worker_of_the_run_has_built_does_not_count_as_cached():
    def found(created: str) -> list[bool]:
        def build(stage: Stage, config: Any, inputs: Mapping[str, Any], label: str = "") -> tuple[Artifact, bool]:
            artifact, _ = fake_build(stage, config, inputs)
            return Artifact(artifact.manifest.model_copy(update={"created": created}), artifact.path), True

        stages = Stages(load_config("demo"), Backend(build, "home"), begun="2026-01-02T00:00:00+00:00")
        for _ in range(2):
            stages.patches(Source(Path("photos"), "digest"))
        return [run.cached for run in stages.runs]

    assert found("2026-01-01T00:00:00+00:00") == [True, True]  # of an earlier run
    assert found("2026-01-02T00:00:01+00:00") == [False, True]  # built meanwhile, then used again
