"""Configs of the diffusion room."""

import subprocess
import sys

import pytest

from ddsr_core.diffusion.config import FinetuneConfig
from tests.helpers.tiny_finetuning import CONFIG


def test_a_config_does_not_cost_an_import_of_torch():
    code = "import sys, ddsr_core.diffusion.config, ddsr_core.sampling.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def test_the_budget_is_steps_or_epochs():
    assert FinetuneConfig(batch_size=8).total_steps(1000) == 8750
    assert FinetuneConfig(batch_size=4, epochs=1).total_steps(9) == 3
    assert CONFIG.total_steps(1000) == 12
    with pytest.raises(ValueError, match="either steps or epochs"):
        FinetuneConfig(steps=3)


def test_a_crop_cannot_be_compared_with_the_whole_patch():
    with pytest.raises(ValueError, match="lsr_reference"):
        FinetuneConfig(lsr_crop_px=32, lsr_reference="patch")
