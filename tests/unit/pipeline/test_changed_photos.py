"""Photos and weights that change while they are trained on or measured: a message, and nothing under a wrong key."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ddsr_core.errors import ChangedInputError
from ddsr_core.evaluation import evaluate
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.evaluation.evaluator import Evaluator
from ddsr_core.imaging.photos import photo_source
from ddsr_core.pipeline.steps import weights_source
from ddsr_core.sr import train_sr
from ddsr_core.sr.config import TrainSRConfig, ValidationConfig
from ddsr_core.sr.networks import build_network
from ddsr_core.sr.validation import Validator
from ddsr_core.sr.weights import save_weights
from ddsr_core.storage.stage import StageInput
from ddsr_core.storage.store import InputRef, Store
from tests.helpers.commands import make_photos

TINY = {"feat": 8, "blocks": 1}
RECIPE = TrainSRConfig(
    arch="edsr-small", arch_kwargs=TINY, iterations=4, batch_size=1, lr_patch_px=8,
    validation=ValidationConfig(every=2, metrics=("psnr_y",), pictures=0),
)  # fmt: skip
CHEAP = EvaluateConfig(metrics=("psnr_y",), crops=0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, StageInput]:
    """Hashed training and test photos."""
    return {
        "data": photo_source(make_photos(tmp_path / "data", 2)),
        "test": photo_source(make_photos(tmp_path / "test", 2, first=2)),
    }


def replace_photo(folder: Path) -> Callable[[], None]:
    """What replaces the last photo of a folder by another one, and again."""
    others = iter(range(10, 20))

    def replace() -> None:
        number = next(others)
        other = make_photos(folder.with_name("other"), 1, first=number)
        shutil.copyfile(other / f"{number}.png", sorted(folder.iterdir())[-1])

    return replace


def replaced_weights(folder: Path) -> StageInput:
    """Weights as an input that was hashed before other weights took their place."""
    network = build_network("edsr-small", TINY)
    save_weights(folder, network, "edsr-small", TINY, 4, {})
    hashed = weights_source(folder)
    next(iter(network.parameters())).data += 1
    save_weights(folder, network, "edsr-small", TINY, 4, {})
    return hashed


def left_over(store: Store) -> list[str]:
    """Artifacts and partial ones."""
    return [path.name for path in store.home.glob("artifacts/*/*") if path.is_dir()]


def before_call(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, number: int, do: Callable[[], None]) -> None:
    """Do something just before the n-th call of a method."""
    method, calls = getattr(owner, name), iter(range(1, 1000))

    def wrapped(*arguments: object) -> object:
        if next(calls) == number:
            do()
        return method(*arguments)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize("changed", ["data", "test"])
def test_photos_replaced_before_the_training_reads_them(store: Store, inputs: dict[str, StageInput], changed: str) -> None:
    replace_photo(inputs[changed].path)()
    with pytest.raises(ChangedInputError, match=f"the input {changed} changed while it was read"):
        store.build(train_sr.STAGE, RECIPE, inputs)
    assert left_over(store) == []


def test_a_test_photo_replaced_between_two_validations(
    store: Store, inputs: dict[str, StageInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    before_call(monkeypatch, Validator, "validate", 2, replace_photo(inputs["test"].path))
    with pytest.raises(ChangedInputError, match="a photo changed during the run"):
        store.build(train_sr.STAGE, RECIPE, inputs)
    assert left_over(store) == []


def test_initial_weights_replaced_before_the_training_reads_them(
    store: Store, inputs: dict[str, StageInput], tmp_path: Path
) -> None:
    init = replaced_weights(tmp_path / "init")
    with pytest.raises(ChangedInputError, match="the input init changed"):
        store.build(train_sr.STAGE, RECIPE, {**inputs, "init": init})
    assert left_over(store) == []


def test_test_photos_replaced_before_the_evaluation_reads_them(store: Store, inputs: dict[str, StageInput]) -> None:
    replace_photo(inputs["test"].path)()
    with pytest.raises(ChangedInputError, match="the input test changed"):
        store.build(evaluate.STAGE, CHEAP, {"test": inputs["test"]})
    assert left_over(store) == []


def test_a_test_photo_replaced_while_another_is_measured_and_put_back(
    store: Store, inputs: dict[str, StageInput], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(inputs["test"].path, tmp_path / "kept")
    before_call(monkeypatch, Evaluator, "read", 2, replace_photo(inputs["test"].path))
    with pytest.raises(ChangedInputError, match="a photo changed during the run"):
        store.build(evaluate.STAGE, CHEAP, {"test": inputs["test"]})
    assert left_over(store) == []
    shutil.copytree(tmp_path / "kept", inputs["test"].path, dirs_exist_ok=True)
    measured, _ = store.build(evaluate.STAGE, CHEAP, {"test": inputs["test"]})
    assert measured.manifest.counts["images"] == 2


def test_weights_replaced_before_the_evaluation_reads_them(
    store: Store, inputs: dict[str, StageInput], tmp_path: Path
) -> None:
    weights = replaced_weights(tmp_path / "weights")
    with pytest.raises(ChangedInputError, match="the input weights changed"):
        store.build(evaluate.STAGE, CHEAP, {"test": inputs["test"], "weights": weights})
    assert left_over(store) == []


def test_artifacts_of_the_store_are_inputs_here_and_in_other_processes(store: Store, inputs: dict[str, StageInput]) -> None:
    trained, _ = store.build(train_sr.STAGE, RECIPE, inputs)
    again = InputRef.model_validate_json(InputRef.of(trained).model_dump_json()).source(store)
    first, _ = store.build(evaluate.STAGE, CHEAP, {"test": inputs["test"], "weights": trained})
    second, cached = store.build(evaluate.STAGE, CHEAP, {"test": inputs["test"], "weights": again})
    assert (first, cached) == (second, True)
    store.forget(first)
    assert store.build(evaluate.STAGE, CHEAP, {"test": inputs["test"], "weights": again})[0].digest == first.digest
