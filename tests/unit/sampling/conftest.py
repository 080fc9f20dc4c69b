"""Inputs of the sampling stage, made once per file."""

from pathlib import Path

import pytest

from tests.helpers.sample_inputs import write_sample_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_sample_inputs(tmp_path_factory.mktemp("inputs"))
