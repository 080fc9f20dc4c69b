"""One request for the command line, the flows, the form and Python."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from ddsr_core.errors import ConfigError
from ddsr_core.experiments.request import ExperimentRequest
from ddsr_core.nightly.request import NightRequest
from ddsr_core.pipeline.config import checked, load_config
from ddsr_core.pipeline.plain import plain_backend
from ddsr_core.pipeline.request import Execution, RunRequest
from ddsr_core.storage.store import Store
from flows.distill import distill
from flows.nightly import nightly
from flows.reproduce import reproduce


@pytest.mark.parametrize(
    ("flow", "request_class", "unasked"),
    [(distill, RunRequest, set()), (reproduce, ExperimentRequest, set()), (nightly, NightRequest, {"run"})],
    ids=["distill", "reproduce", "nightly"],
)
def test_a_flow_asks_for_the_fields_of_its_request_with_the_same_defaults(flow: Any, request_class: Any, unasked: set[str]):
    parameters = inspect.signature(flow.fn).parameters
    assert set(parameters) == set(request_class.model_fields) - unasked
    for name, parameter in parameters.items():
        if flow is nightly and name in ("images", "test"):  # a night on schedule says clearly what is missing
            continue
        field = request_class.model_fields[name]
        assert field.is_required() == (parameter.default is parameter.empty), name
        if not field.is_required():
            assert field.default == parameter.default, name


@pytest.mark.parametrize(
    ("photos", "name"),
    [("/data/holidays", "paper-holidays"), ("/data/holidays/*.jpg", "paper-holidays"), ("/data/a b.parquet", "paper-a-b")],
)
def test_a_run_is_named_by_its_preset_and_photos(photos: str, name: str):
    assert RunRequest(images=Path(photos), preset="paper").run_name == name
    assert RunRequest(images=Path(photos), run="mine").run_name == "mine"


def test_an_experiments_run_is_named_like_it():
    assert ExperimentRequest(images=Path("x"), test=Path("y"), experiment="table2").run_name == "table2"


def test_a_complete_config_is_not_mixed_with_another_preset():
    best = load_config("best")
    assert RunRequest(images=Path("x"), config=best).resolved_config() == best
    assert RunRequest(images=Path("x"), config=best, overrides=("sample.count=3",)).resolved_config().sample.count == 3
    with pytest.raises(ConfigError, match="contradict each other"):
        checked(RunRequest, {"images": "x", "config": best, "preset": "paper"})


def test_the_form_asks_for_preset_and_overrides_and_not_for_every_field():
    for flow in (distill, reproduce, nightly):
        asked = flow.parameters.properties
        assert "config" not in asked
        assert {"preset", "overrides"} <= set(asked)


def test_an_experiment_starts_from_the_preset_of_its_protocol():
    request = ExperimentRequest(images=Path("x"), test=Path("y"), overrides=("sample.count=3",))
    assert request.resolved_config() == load_config("demo", overrides=["sample.count=3"], protocol="mini")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpu": "here"}, "'here' is now called 'local'"),
        ({"runner": "one by one"}, "'one by one' is now called 'sequential'"),
        ({"workers": 0}, "workers"),
        ({"imagez": "x"}, "did you mean images?"),
    ],
)
def test_a_wrong_request_says_what_to_do(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        checked(RunRequest, {"images": "x", **values})
    assert message in str(caught.value)


@pytest.mark.parametrize("execution", [Execution(runner="ray"), Execution(gpu="pool")], ids=["ray", "pool"])
def test_what_needs_prefect_is_refused_without_it(execution: Execution, tmp_path: Path):
    with pytest.raises(ConfigError, match="needs Prefect"):
        plain_backend(execution, Store(tmp_path))
