"""The cost of training sets and networks beside their quality."""

from pathlib import Path

from ddsr_core.experiments.costs import cost_of_training, cost_tables, costs_markdown, costs_of_set
from ddsr_core.experiments.design import Cell, as_csv
from ddsr_core.pipeline.stages import StageRun
from ddsr_core.storage.stage import Artifact, Manifest


def artifact(stage: str, key: str, seconds: float, cpu: float | None) -> Artifact:
    manifest = Manifest(
        stage=stage, key=key, digest=key, stage_version=1, config={}, parents={}, counts={}, files={}, bytes=0, created="",
        seconds=seconds, device="cpu", cpu_seconds=cpu,
    )  # fmt: skip
    return Artifact(manifest, Path(stage))


def runs(*artifacts: Artifact) -> list[StageRun]:
    return [StageRun(item.manifest.stage, item, cached=True) for item in artifacts]


def test_the_teacher_is_part_of_the_cost_of_a_restored_set_and_an_artifact_counts_once():
    teacher = artifact("train_sr", "t", 40, 70)
    tuned, drawn = artifact("finetune", "f", 60, 100), artifact("sample", "s", 20, None)
    made = runs(artifact("patches", "p", 5, 5), tuned, drawn, teacher, teacher)
    assert costs_of_set(made) == {
        "finetune_s": 60, "finetune_cpu_s": 100, "images_s": 20, "teacher_s": 40, "teacher_cpu_s": 70,
    }  # fmt: skip
    restored = runs(artifact("crops", "c", 1, 1), teacher, artifact("restore", "r", 2, 3))
    assert costs_of_set(restored) == {"images_s": 3, "images_cpu_s": 4, "teacher_s": 40, "teacher_cpu_s": 70}
    assert cost_of_training(teacher) == {"training_s": 40, "training_cpu_s": 70}


def cell(variant: str, seed: int, costs: dict[str, float]) -> Cell:
    return Cell(variant, "EDSR", seed, {"psnr_y": 25.0}, {}, 70, 1000, costs)


def test_costs_are_means_over_seeds_and_stand_in_every_file():
    cells = [
        cell("distilled", 0, {"finetune_s": 60.0, "finetune_cpu_s": 110.0, "training_s": 10.0}),
        cell("distilled", 1, {"finetune_s": 62.0, "finetune_cpu_s": 112.0, "training_s": 14.0}),
        cell("random", 0, {"images_s": 1.0, "training_s": 12.0}),
    ]
    sets, networks = cost_tables(cells)
    assert sets.rows == [["distilled", "70", "61.0 (111.0)", "", ""], ["random", "70", "", "1.0", ""]]
    assert networks.rows == [["EDSR", "1,000", "12.0"]]
    assert "| distilled | 70 | 61.0 (111.0) |  |  |" in costs_markdown(cells)
    assert as_csv(cells).splitlines()[0].endswith("psnr_y,finetune_cpu_s,finetune_s,images_s,training_s")
    assert costs_markdown([cell("random", 0, {})]) == []
