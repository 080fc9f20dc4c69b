"""Which home a user means."""

from __future__ import annotations

import os
from pathlib import Path

DEFAULT_HOME = "ddsr-home"


def home_of(home: str | None) -> str:
    """The home that is named, or $DDSR_HOME, or ./ddsr-home: an absolute folder, or a URL on S3."""
    named = home or os.environ.get("DDSR_HOME", DEFAULT_HOME)
    return named if "://" in named else str(Path(named).expanduser().absolute())
