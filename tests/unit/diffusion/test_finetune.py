"""Stage fine-tuning: files, exact resume, errors that name the term, inputs that do not fit."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from ddsr_core.config import Runtime
from ddsr_core.diffusion import finetune
from ddsr_core.diffusion.base import load_base
from ddsr_core.diffusion.difffit import ROWS, load_adapter
from ddsr_core.diffusion.finetune_loss import TERMS, FinetuneLoss
from ddsr_core.diffusion.finetune_trainer import FinetuneTrainer
from ddsr_core.diffusion.training_set import TrainingSet
from ddsr_core.errors import InputError, TrainingError
from ddsr_core.progress import Bar
from tests.helpers.interruption import Killed, digests, killing_after
from tests.helpers.reporting import Recorder, read_events, reported_in
from tests.helpers.tiny_base import write_clusters
from tests.helpers.tiny_finetuning import CONFIG, LABEL_MAP, read_csv


def test_a_finished_stage_has_all_its_files(finished: Path):
    names = set(digests(finished))
    assert names == {
        "adapter.json", "adapter.safetensors", "adapter_ema.safetensors", "curves.csv", "gradients.csv", "summary.json",
        "texture.csv",
        "samples/step-000000.png", "samples/step-000006.png", "samples/step-000012.png",
    }  # fmt: skip
    facts = json.loads((finished / "adapter.json").read_text())
    assert facts["label_map"] == [[0, 0], [1, 1], [2, 2]]
    assert facts["config"]["steps"] == 12


def test_every_term_is_written_for_every_step_and_its_gradient_norm_at_intervals(finished: Path):
    curves, gradients = read_csv(finished / "curves.csv"), read_csv(finished / "gradients.csv")
    assert [int(row["step"]) for row in curves] == list(range(1, 13))
    assert [int(row["step"]) for row in gradients] == [1, 6, 11]
    for row in (*curves, *gradients):
        assert set(row) == {"step", *TERMS}
        assert all(torch.isfinite(torch.tensor(float(cell))) for cell in row.values())
    assert float(curves[0]["d"]) == 0.0  # memories are empty at first
    assert float(curves[-1]["r"]) > 0
    assert all(float(gradients[-1][term]) > 0 for term in ("simple", "vb", "r", "d"))


def test_tensorboard_shows_the_terms_their_gradients_texture_and_samples(finished: Path):
    events = read_events(reported_in(finished) / "finetune")
    curves, gradients = read_csv(finished / "curves.csv"), read_csv(finished / "gradients.csv")
    for term in TERMS:
        shown = [(event.step, event.value) for event in events.Scalars(f"train/{term}")]
        assert shown == [(int(row["step"]), pytest.approx(float(row[term]), abs=1e-4)) for row in curves]
    assert [event.step for event in events.Scalars("gradients/simple")] == [int(row["step"]) for row in gradients]
    assert [event.step for event in events.Scalars("texture/samples_db")] == [0, 3, 6, 9]
    assert [picture.step for picture in events.Images("samples")] == [6, 12]


def test_a_point_of_a_long_curve_is_the_mean_of_its_steps(inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(finetune, "CURVE_POINTS", 3)
    recorder = Recorder()
    trainer = FinetuneTrainer(load_base(str(inputs["base"])), CONFIG, LABEL_MAP)
    for step in range(1, 11):
        trainer.curve.append({"step": step, **dict.fromkeys(TERMS, float(step))})
        trainer.step = step
        finetune.report(trainer, 10, recorder)
    points = [(step, values["train/simple"]) for step, values in recorder.rows if values]
    assert points == [(3, 2.0), (6, 5.0), (9, 8.0), (10, 10.0)]


@pytest.mark.parametrize(("title", "amount"), [("Fine-tuning", 2), ("Fine-tuning", 10)])
def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(
    inputs: dict[str, Path], finished: Path, tmp_path: Path, title: str, amount: int
):
    with pytest.raises(Killed):
        finetune.run(CONFIG, **inputs, out=tmp_path, runtime=killing_after(title, amount))
    finetune.run(CONFIG, **inputs, out=tmp_path, runtime=Runtime())
    assert digests(tmp_path) == digests(finished)


def test_a_resumed_run_does_not_start_again(inputs: dict[str, Path], tmp_path: Path):
    with pytest.raises(Killed):
        finetune.run(CONFIG, **inputs, out=tmp_path, runtime=killing_after("Fine-tuning", 10))
    started_at: list[int] = []

    @contextmanager
    def progress(name: str, *, total: int, unit: str = "items", done: int = 0) -> Iterator[Bar]:
        started_at.append(done)
        with Runtime().progress(name, total=total) as bar:
            yield bar

    finetune.run(CONFIG, **inputs, out=tmp_path, runtime=Runtime(progress=progress))
    assert started_at == [8]


def test_averaged_and_last_weights_differ_and_lie_on_the_adapters_base(finished: Path, inputs: dict[str, Path]):
    raw, ema = load_adapter(finished, "raw"), load_adapter(finished, "ema")
    assert not torch.equal(raw.tensors[ROWS], ema.tensors[ROWS])
    base = load_base(str(inputs["base"]))
    raw.apply(base.dit, base.digest)


@pytest.mark.parametrize("term", ["simple", "sr"])
def test_a_loss_that_is_not_finite_names_its_term_and_step_and_keeps_a_checkpoint(
    inputs: dict[str, Path], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, term: str
):
    original = FinetuneLoss.terms

    def broken(self, *args, **named):  # type: ignore[no-untyped-def]
        terms, x0_hat = original(self, *args, **named)
        return ({**terms, term: terms[term] * float("nan")} if broken.step == 6 else terms), x0_hat

    advance = FinetuneTrainer.advance

    def counted(self: FinetuneTrainer, data: TrainingSet) -> dict[str, float]:
        broken.step = self.step  # type: ignore[attr-defined]
        return advance(self, data)

    monkeypatch.setattr(FinetuneLoss, "terms", broken)
    monkeypatch.setattr(FinetuneTrainer, "advance", counted)
    with pytest.raises(TrainingError, match=rf"'{term}' is nan at step 6"):
        finetune.run(CONFIG, **inputs, out=tmp_path, runtime=Runtime())
    monkeypatch.undo()
    finetune.run(CONFIG, **inputs, out=tmp_path, runtime=Runtime())
    assert digests(tmp_path) == digests(finished)


def test_latents_of_another_shape_are_refused(inputs: dict[str, Path], tmp_path: Path):
    wrong = tmp_path / "latents"
    shutil.copytree(inputs["latents"], wrong)
    np.save(wrong / "mean.npy", np.zeros((2, 24, 4, 8, 8), np.float16))
    with pytest.raises(InputError, match="do not fit a DiT"):
        finetune.run(CONFIG, **{**inputs, "latents": wrong}, out=tmp_path, runtime=Runtime())


def test_clusters_of_other_patches_are_refused(inputs: dict[str, Path], tmp_path: Path):
    fewer = write_clusters(tmp_path / "clusters", count=6)
    with pytest.raises(InputError, match="no pseudo-label"):
        finetune.run(CONFIG, **{**inputs, "clusters": fewer}, out=tmp_path, runtime=Runtime())


def test_more_pseudo_labels_than_class_rows_are_refused(inputs: dict[str, Path], tmp_path: Path):
    many = write_clusters(tmp_path / "clusters", k=13)
    with pytest.raises(InputError, match="13 pseudo-labels do not fit"):
        finetune.run(CONFIG, **{**inputs, "clusters": many}, out=tmp_path, runtime=Runtime())


def test_no_steps_leave_the_base_as_it_is(inputs: dict[str, Path], tmp_path: Path):
    config = CONFIG.model_copy(update={"steps": 0, "class_row_init": "imagenet_rows"})
    finetune.run(config, **inputs, out=tmp_path, runtime=Runtime())
    base = load_base(str(inputs["base"]))
    before = {name: value.clone() for name, value in base.dit.state_dict().items()}
    load_adapter(tmp_path).apply(base.dit, base.digest)
    after = base.dit.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(bool((after[name] == 1).all()) for name in after.keys() - before.keys())
