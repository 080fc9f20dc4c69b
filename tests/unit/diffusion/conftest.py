"""Inputs of fine-tuning, made once per file."""

from pathlib import Path

import pytest

from ddsr_core.config import Runtime
from ddsr_core.diffusion import finetune
from ddsr_core.reporters import reporter_to
from tests.helpers.reporting import reported_in
from tests.helpers.tiny_finetuning import CONFIG, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    finetune.run(CONFIG, **inputs, out=out, runtime=Runtime(reporter=reporter_to("tensorboard", reported_in(out))))
    return out
