"""The configs: rules, and that importing them loads no heavy library."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from ddsr_core.pseudo_labels.config import EmbeddingsConfig, PatchesConfig


def test_exactly_one_threshold_rule() -> None:
    with pytest.raises(ValidationError, match="exactly one"):
        PatchesConfig(threshold_db=23.0)
    with pytest.raises(ValidationError, match="exactly one"):
        PatchesConfig(quantile=None)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValidationError, match="open_clip"):
        EmbeddingsConfig(backend="clip")  # type: ignore[arg-type]


def test_configs_import_no_heavy_library() -> None:
    heavy = ("torch", "numpy", "pyarrow", "lancedb", "sklearn", "open_clip", "cv2", "PIL")
    code = f"import sys, ddsr_core.pseudo_labels.config; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
