"""What a config of the evaluation accepts, and what it means."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.metrics.spec import DEFAULT_METRICS, METRICS


def test_config_refuses_what_cannot_work():
    with pytest.raises(ValidationError, match="multiple of scale"):
        EvaluateConfig(mod_crop=6)
    with pytest.raises(ValidationError, match="more than twice"):
        EvaluateConfig(tile_px=96)
    with pytest.raises(ValidationError, match="unknown metric 'psnr_x'; use one of psnr_y"):
        EvaluateConfig(metrics=("psnr_y", "psnr_x"))
    with pytest.raises(ValidationError, match="at least 1"):
        EvaluateConfig(metrics=())


@pytest.mark.parametrize(("scale", "mod_crop", "multiple"), [(2, None, 2), (3, None, 3), (4, None, 4), (4, 8, 8)])
def test_images_are_cropped_to_a_multiple_of_the_scale_or_of_mod_crop(scale: int, mod_crop: int | None, multiple: int):
    assert EvaluateConfig(scale=scale, mod_crop=mod_crop).multiple == multiple


def test_true_and_false_add_and_remove_metrics():
    assert EvaluateConfig().metrics == DEFAULT_METRICS
    assert EvaluateConfig.model_validate({"lpips": False}).metrics == ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")
    assert EvaluateConfig.model_validate({"dists": True}).metrics == (*DEFAULT_METRICS, "dists")
    assert EvaluateConfig.model_validate({"metrics": ["ssim_y"], "psnr_y": True}).metrics == ("psnr_y", "ssim_y")
    with pytest.raises(ValidationError, match="unknown metric"):
        EvaluateConfig.model_validate({"metrics": ["psnr_x"], "lpips": False})
    with pytest.raises(ValidationError, match="Extra inputs"):
        EvaluateConfig.model_validate({"lpips": "yes"})


def test_a_config_written_and_read_again_is_the_same():
    config = EvaluateConfig.model_validate({"lpips": False, "dists": True})
    assert EvaluateConfig.model_validate(config.model_dump(mode="json")) == config


def test_the_form_offers_every_metric():
    items = EvaluateConfig.model_json_schema()["properties"]["metrics"]["items"]
    assert items["enum"] == list(METRICS)


@pytest.mark.parametrize("room", ["evaluation", "sr"])
def test_a_config_imports_no_torch(room: str):
    code = f"import sys, ddsr_core.{room}.config; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'pyarrow')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
