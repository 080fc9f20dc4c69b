"""The public functions as a typed program uses them: `mypy` checks this file, nothing runs it.

The functions are loaded on first use by ``ddsr_core.__getattr__``. If that hid their types, every value would be Any and
`assert_type` an error.
"""

from pathlib import Path
from typing import Any, assert_type

import ddsr_core
from ddsr_core import api
from ddsr_core.pipeline.config import PipelineConfig
from ddsr_core.pipeline.run_state import Outcome
from ddsr_core.sr.upscale import Upscaled


def typed_use(photos: Path) -> None:
    assert_type(ddsr_core.distill(photos, preset="demo"), Outcome)
    assert_type(ddsr_core.train(photos, iterations=2), Path)
    assert_type(ddsr_core.evaluate(None, photos), dict[str, float | None])
    assert_type(ddsr_core.upscale(photos, photos, photos), Upscaled)
    assert_type(ddsr_core.search("leaves", "demo"), list[dict[str, Any]])
    assert_type(ddsr_core.load_distilled(photos), list[api.DistilledImage])
    assert_type(ddsr_core.preset_config("best"), PipelineConfig)
    assert_type(ddsr_core.list_runs(), list[dict[str, Any]])
    assert_type(ddsr_core.demo_photos(photos), tuple[Path, Path])
    assert_type(ddsr_core.reproduce("table2", photos, photos), dict[str, Any])
